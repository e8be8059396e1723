#!/usr/bin/env bash
# Builds the native core and puts it into the source tree: what `maturin develop` does, without touching any
# environment. Then `PYTHONPATH=python` is enough to use the package.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked -p tilewise-python
target="${CARGO_TARGET_DIR:-target}/release"
for library in lib_core.so lib_core.dylib _core.dll; do
  [ -f "$target/$library" ] || continue
  case $library in *.dll) name=_core.pyd ;; *) name=_core.abi3.so ;; esac
  cp "$target/$library" "python/tilewise/.$name.new" && mv "python/tilewise/.$name.new" "python/tilewise/$name"
done
