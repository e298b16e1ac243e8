// The logits of a model as float32, for tools/gpu_logits.py to compare: of a prompt's last position
// and, token by token, of a continuation. Under mpirun: tensor-parallel.
//
//   model_logits MODEL TOKENS.json OUT.f32 CPU|CUDA      TOKENS.json: {"prompt": […], "then": […]}
#include <mpi.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>

#include "cluster/launch.h"
#include "cluster/mpi_collectives.h"
#include "runtime/base/error.h"
#include "runtime/model/transformer.h"
#include "tests/model/reference_loop.h"

namespace passel {
namespace {

void Run(int argc, char** argv) {
  cluster::Launch launch(&argc, &argv);
  if (argc != 5) throw Error(ErrorClass::kUsage, "expected MODEL TOKENS.json OUT.f32 CPU|CUDA");
  std::ifstream text(argv[2]);
  const auto json = nlohmann::json::parse(text);
  const auto prompt = json.at("prompt").get<std::vector<int32_t>>();
  const auto then = json.at("then").get<std::vector<int32_t>>();

  const gpu::DeviceOptions options{.local_rank = launch.world_rank(),
                                   .local_ranks = launch.world_size()};
  std::string why;
  const auto device = std::string(argv[4]) == "CUDA" ? gpu::MakeCudaDevice(options, &why)
                                                     : gpu::MakeCpuDevice(options);
  if (!device) throw Error(ErrorClass::kUsage, why);
  const auto collectives =
      device->MakeCollectives(std::make_unique<cluster::MpiCollectives>(MPI_COMM_WORLD));
  const auto file = model::ModelFile::Open(argv[1]);
  const model::Transformer transformer(*file, *device, *collectives, nullptr);
  model::ReferenceLoop loop(*device, transformer, 1,
                            static_cast<int64_t>(prompt.size() + then.size()));
  std::ofstream out;
  if (launch.world_rank() == 0) {
    out.open(argv[3], std::ios::binary);
    std::fprintf(stderr, "%s (%s), collectives: %s\n", device->info().name.c_str(),
                 device->info().backend.c_str(), std::string(collectives->name()).c_str());
  }
  const auto put = [&](const std::vector<float>& logits) {
    out.write(reinterpret_cast<const char*>(logits.data()),
              static_cast<std::streamsize>(logits.size() * sizeof(float)));
  };
  put(loop.Prefill(0, prompt));
  for (const int32_t id : then) put(loop.DecodeOne(0, id));
}

}  // namespace
}  // namespace passel

int main(int argc, char** argv) {
  try {
    passel::Run(argc, argv);
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "model_logits: %s\n", e.what());
    return 1;
  }
}
