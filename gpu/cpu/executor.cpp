#include "gpu/cpu/executor.h"

#include <omp.h>

namespace passel::gpu::cpu {

SingleThreadedOpenMp::SingleThreadedOpenMp() : threads_before_(omp_get_max_threads()) {
  omp_set_num_threads(1);
}

SingleThreadedOpenMp::~SingleThreadedOpenMp() { omp_set_num_threads(threads_before_); }

}  // namespace passel::gpu::cpu
