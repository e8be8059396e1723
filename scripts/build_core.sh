#!/usr/bin/env bash
# Builds the native core and puts it into the source tree: what `maturin develop` does, without touching any
# environment. Then `PYTHONPATH=python` is enough to use the package.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v cargo >/dev/null; then
  echo "tilewise needs cargo (Rust 1.89 or newer) to build its core, and found none on PATH." >&2
  echo "Get it from https://rustup.rs (or your system's packages: rustup, cargo), then run this again." >&2
  exit 1
fi
# An extension module takes Python's symbols from the process that loads it. Without the first variable the linker
# also ties it to the libpython of whichever python was found at build time: two interpreters in one process.
# The stable ABI asks no interpreter anything, hence the second (one build serves every environment, and no rebuild).
export PYO3_BUILD_EXTENSION_MODULE=1 PYO3_NO_PYTHON=1
cargo build --release --locked -p tilewise-python
target="${CARGO_TARGET_DIR:-target}/release"
for library in lib_core.so lib_core.dylib _core.dll; do
  [ -f "$target/$library" ] || continue
  case $library in *.dll) name=_core.pyd ;; *) name=_core.abi3.so ;; esac
  # A running process keeps the file it has: replace it, never write into it.
  cmp -s "$target/$library" "python/tilewise/$name" ||
    { cp "$target/$library" "python/tilewise/.$name.new" && mv "python/tilewise/.$name.new" "python/tilewise/$name"; }
done
