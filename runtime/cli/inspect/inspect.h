#pragma once

#include <ostream>
#include <string>

namespace passel {

// `passel inspect`: prints what the files of a model say, one line each, and which of it is served:
// architecture, tensor types, RoPE scaling, tokenizer, chat template, and the model as a whole.
// Works without mpirun; reads no weights. Returns the exit code: 0, or 3 (ErrorClass::kModel) where
// prompts cannot be answered; a chat template that is not served leaves it at 0. Throws
// Error{kModel} where there is nothing to report: no file, no config, no GGUF.
int RunInspect(const std::string& path, std::ostream& out);

}  // namespace passel
