#pragma once

#include <ostream>
#include <string>

namespace passel {

// `passel inspect`: prints a model's architecture and sizes, one line each, and what its tokenizer
// and chat template allow. Works without mpirun; reads no weights. Returns the exit code: 0. Throws
// Error{kModel} where the model cannot be served at all, saying why.
int RunInspect(const std::string& path, std::ostream& out);

}  // namespace passel
