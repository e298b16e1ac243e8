#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/model/gguf_writer.h"

namespace passel {

// The smallest models that open, as the bytes of their files: one layer, 16 wide, one head, eleven
// tokens. All weights are zero.
struct TinyModel {
  static constexpr int64_t kHidden = 16, kVocab = 11;

  // Hugging Face's name, GGUF's name, [rows, cols]; a vector has one row.
  struct Weight {
    std::string hf, gguf;
    uint64_t rows, cols;
  };
  static std::vector<Weight> Weights(const std::string& architecture = "llama") {
    const std::string l = "model.layers.0.", b = "blk.0.";
    std::vector<Weight> weights = {
        {"model.embed_tokens.weight", "token_embd.weight", kVocab, kHidden},
        {"model.norm.weight", "output_norm.weight", 1, kHidden},
        {l + "input_layernorm.weight", b + "attn_norm.weight", 1, kHidden},
        {l + "self_attn.q_proj.weight", b + "attn_q.weight", kHidden, kHidden},
        {l + "self_attn.k_proj.weight", b + "attn_k.weight", kHidden, kHidden},
        {l + "self_attn.v_proj.weight", b + "attn_v.weight", kHidden, kHidden},
        {l + "self_attn.o_proj.weight", b + "attn_output.weight", kHidden, kHidden},
        {l + "post_attention_layernorm.weight", b + "ffn_norm.weight", 1, kHidden},
        {l + "mlp.gate_proj.weight", b + "ffn_gate.weight", kHidden, kHidden},
        {l + "mlp.up_proj.weight", b + "ffn_up.weight", kHidden, kHidden},
        {l + "mlp.down_proj.weight", b + "ffn_down.weight", kHidden, kHidden}};
    if (architecture == "qwen2") {
      for (const std::string x : {"q", "k", "v"}) {
        weights.push_back(
            {l + "self_attn." + x + "_proj.bias", b + "attn_" + x + ".bias", 1, kHidden});
      }
    } else if (architecture == "qwen3") {
      for (const std::string x : {"q", "k"}) {
        weights.push_back(
            {l + "self_attn." + x + "_norm.weight", b + "attn_" + x + "_norm.weight", 1, kHidden});
      }
    }
    return weights;
  }

  // All layers slide.
  static nlohmann::json QwenConfig(const std::string& architecture) {
    nlohmann::json config = Config();
    config["model_type"] = architecture;
    config["use_sliding_window"] = true;
    config["max_window_layers"] = 0;
    config["layer_types"] = {"sliding_attention"};
    return config;
  }

  static nlohmann::json Config() {
    return {{"model_type", "mistral"},
            {"hidden_act", "silu"},
            {"attention_bias", false},
            {"mlp_bias", false},
            {"hidden_size", kHidden},
            {"intermediate_size", kHidden},
            {"num_hidden_layers", 1},
            {"num_attention_heads", 1},
            {"num_key_value_heads", 1},
            {"head_dim", kHidden},
            {"max_position_embeddings", 64},
            {"rms_norm_eps", 1e-5},
            {"rope_theta", 1e6},
            {"rope_scaling",
             {{"rope_type", "llama3"},
              {"factor", 8.0},
              {"low_freq_factor", 1.0},
              {"high_freq_factor", 4.0},
              {"original_max_position_embeddings", 16}}},
            {"sliding_window", 32},
            {"vocab_size", kVocab},
            {"eos_token_id", 2},
            {"tie_word_embeddings", true}};
  }

  // Header and data of the weights as BF16.
  static nlohmann::json SafetensorsHeader(const std::string& architecture = "llama") {
    nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
    uint64_t at = 0;
    for (const Weight& w : Weights(architecture)) {
      const uint64_t end = at + 2 * w.rows * w.cols;
      const auto shape = w.rows == 1 ? nlohmann::json{w.cols} : nlohmann::json{w.rows, w.cols};
      header[w.hf] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {at, end}}};
      at = end;
    }
    return header;
  }
  static std::string SafetensorsData(const std::string& architecture = "llama") {
    uint64_t bytes = 0;
    for (const Weight& w : Weights(architecture)) bytes += 2 * w.rows * w.cols;
    return std::string(bytes, '\0');
  }

  // Byte-level BPE of eleven tokens.
  static nlohmann::json Tokenizer() {
    return {
        {"version", "1.0"},
        {"normalizer", nullptr},
        {"pre_tokenizer",
         {{"type", "Sequence"},
          {"pretokenizers",
           {{{"type", "Split"},
             {"pattern", {{"Regex", R"(\s+|\S+)"}}},
             {"behavior", "Isolated"},
             {"invert", false}},
            {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}}},
        {"post_processor",
         {{"type", "TemplateProcessing"},
          {"single", {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}}}}},
        {"added_tokens",
         {{{"id", 1}, {"content", "<s>"}, {"special", true}, {"normalized", false}},
          {{"id", 2}, {"content", "</s>"}, {"special", true}, {"rstrip", true}}}},
        {"model",
         {{"type", "BPE"},
          {"ignore_merges", false},
          {"byte_fallback", false},
          {"vocab", {{"a", 0}, {"<s>", 1}, {"</s>", 2}, {"b", 3}, {"c", 4}, {"ab", 5}, {"abc", 6}}},
          {"merges", {"a b", "ab c"}}}}};
  }
  // SentencePiece's kind: with byte tokens, a normaliser and an unknown token.
  static nlohmann::json SentencePieceTokenizer() {
    nlohmann::json tokenizer = Tokenizer();
    tokenizer["normalizer"] = {
        {"type", "Sequence"},
        {"normalizers",
         {{{"type", "Prepend"}, {"prepend", "\u2581"}},
          {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}}}};
    tokenizer["pre_tokenizer"] = nullptr;
    tokenizer["model"]["byte_fallback"] = true;
    tokenizer["model"]["fuse_unk"] = true;
    tokenizer["model"]["unk_token"] = "a";
    tokenizer["model"]["vocab"]["<0x41>"] = 7;
    tokenizer["model"]["vocab"]["\u2581"] = 8;
    return tokenizer;
  }

  // The same as GGUF. `sentence_piece`: scores instead of merges.
  static GgufWriter Gguf(bool sentence_piece, const std::string& architecture = "llama") {
    const std::string prefix = architecture + ".";
    GgufWriter w;
    w.String("general.architecture", architecture);
    w.Uint32("general.alignment", 32);
    for (const char* key : {"embedding_length", "feed_forward_length", "attention.key_length",
                            "attention.value_length", "rope.dimension_count"}) {
      w.Uint32(prefix + key, kHidden);
    }
    for (const char* key : {"block_count", "attention.head_count", "attention.head_count_kv"}) {
      w.Uint32(prefix + key, 1);
    }
    w.Uint32(prefix + "context_length", 64);
    w.Uint32(prefix + "attention.sliding_window", 32);
    w.Float(prefix + "attention.layer_norm_rms_epsilon", 1e-5f);
    w.Float(prefix + "rope.freq_base", 1e6f);
    w.String(prefix + "rope.scaling.type", "linear");
    w.Float(prefix + "rope.scaling.factor", 2);
    w.String("tokenizer.ggml.model", sentence_piece ? "llama" : "gpt2");
    w.String("tokenizer.ggml.pre", sentence_piece ? "default" : "llama-bpe");
    w.Strings("tokenizer.ggml.tokens",
              {"a", "<s>", "</s>", "b", "c", "ab", "abc", "<0x41>", "\u2581", "d", "e"});
    w.Ints("tokenizer.ggml.token_type", {1, 3, 3, 1, 1, 1, 1, sentence_piece ? 6 : 1, 1, 4, 2});
    if (sentence_piece) {
      w.Floats("tokenizer.ggml.scores", {0, 0, 0, -3, -4, -5, -6, 0, -8, -9, -10});
    } else {
      w.Strings("tokenizer.ggml.merges", {"a b", "ab c"});
    }
    w.Uint32("tokenizer.ggml.bos_token_id", 1);
    w.Uint32("tokenizer.ggml.eos_token_id", 2);
    w.Uint32("tokenizer.ggml.unknown_token_id", 10);
    for (const Weight& weight : Weights(architecture)) {
      const std::vector<uint64_t> dims = weight.rows == 1
                                             ? std::vector<uint64_t>{weight.cols}
                                             : std::vector<uint64_t>{weight.cols, weight.rows};
      w.F32(weight.gguf, dims, std::vector<float>(weight.rows * weight.cols));
    }
    return w;
  }
};

}  // namespace passel
