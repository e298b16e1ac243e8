#pragma once

#include <memory>

#include "runtime/tokenizer/tokenizer.h"
#include "tests/tokenizer/test_vocabulary.h"

namespace passel::engine {

// Bytes as tokens 0 … 255, ChatML's turn marks as 256 and 257, which also ends generation. The
// model has no row for one more token, "[PAD]".
inline std::unique_ptr<Tokenizer> ByteTokenizer() {
  TokenizerData data = ByteVocabulary({});
  AddToken(data, "<|im_start|>", TokenizerData::TokenType::kSpecial);
  const int32_t end = AddToken(data, "<|im_end|>", TokenizerData::TokenType::kSpecial);
  AddToken(data, "[PAD]", TokenizerData::TokenType::kSpecial);
  data.model_vocab = 258;
  data.eos = end;
  data.stop = {end};
  data.chat_template =
      "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
      "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
  return Tokenizer::Make(data);
}

}  // namespace passel::engine
