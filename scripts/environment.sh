#!/usr/bin/env bash
# Makes `.venv` (or $VENV) ready for development, and does nothing when it already is.
#
#   ~/.cache/tilewise/venvs/<key>/   the packages of requirements/dev.lock: gigabytes, shared by every checkout
#   .venv/                           a light environment of this checkout: those packages and python/ on its path
#
# The key is a hash of the lock, the Python and the platform, so a changed lock is a new environment and an unchanged
# one is found again by a fresh clone. A store is built under another name and renamed when complete: an interrupted
# installation is never mistaken for a finished one. Environments cannot be moved, but a store is only ever used for
# its packages (through a .pth file), never for its scripts: hence `python -m tool` everywhere.
#
# PYTHON: the interpreter to use (default: the first of python3.11 ... that works). VENV: where (default .venv).
# TILEWISE_VENV_CACHE: where the stores are (default ${XDG_CACHE_HOME:-~/.cache}/tilewise/venvs).
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
venv=${VENV:-.venv}
lock=requirements/dev.lock

works() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
python=
# 3.11 first: that is what the lock was resolved for. A name may be a shim that leads nowhere, so each is tried.
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
  if works "$candidate"; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
  echo "tilewise needs Python 3.11 or newer with its venv module; tried: ${PYTHON:-python3.11 to python3.14, python3, python}." >&2
  echo "Install one (on Debian and Ubuntu also the package python3-venv), or name it: make PYTHON=/path/to/python" >&2
  exit 1
fi

key=$("$python" - "$lock" <<'PY'
import hashlib, pathlib, platform, sys
identity = [sys.version.split()[0], sys.implementation.cache_tag, sys.base_prefix, platform.system(), platform.machine()]
digest = hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes() + "\n".join(identity).encode()).hexdigest()
print(f"py{sys.version_info[0]}{sys.version_info[1]}-{digest[:16]}")
PY
)
store=${TILEWISE_VENV_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tilewise/venvs}/$key

if [ ! -d "$store" ]; then
  echo "Installing the locked packages into $store (once for this lock; PyTorch makes it about 5 GB)" >&2
  mkdir -p "$(dirname "$store")"
  building=$store.building.$$
  trap 'rm -rf "$building"' EXIT
  "$python" -m venv "$building"
  # The lock is the whole closure, so nothing is left to resolve; `pip check` would tell if that were not so.
  "$building/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps -r "$lock" >&2
  "$building/bin/python" -m pip --disable-pip-version-check check >&2
  # Another checkout may have been faster; its store is as good.
  mv -T "$building" "$store" 2>/dev/null || { [ -d "$store" ] || mv "$building" "$store"; }
  rm -rf "$building"
  trap - EXIT
fi

stamp="$key $checkout $(cksum <scripts/environment.sh)"
if [ "$(cat "$venv/tilewise-stamp" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi
if [ -e "$venv" ] || [ -L "$venv" ]; then
  if [ ! -e "$venv/tilewise-stamp" ]; then
    echo "$venv exists and was not made by scripts/environment.sh: move it away, or choose another name with VENV=..." >&2
    exit 1
  fi
  rm -rf "$venv"
fi
mkdir -p "$venv" && echo incomplete >"$venv/tilewise-stamp"
"$python" -m venv --without-pip "$venv"
"$venv/bin/python" - "$store" "$checkout" <<'PY'
import pathlib, sys, sysconfig
store, checkout = map(pathlib.Path, sys.argv[1:])
packages = sysconfig.get_path("purelib", vars={"base": str(store), "platbase": str(store)})
here = pathlib.Path(sysconfig.get_path("purelib"))
# addsitedir, so that the store's own .pth files count too.
here.joinpath("tilewise-dev.pth").write_text(f"import site; site.addsitedir({packages!r})\n{checkout / 'python'}\n")
# cuda.pathfinder looks for NVIDIA's libraries and headers in the site directories, not along the import path.
if pathlib.Path(packages, "nvidia").is_dir():
    here.joinpath("nvidia").symlink_to(pathlib.Path(packages, "nvidia"))
script = pathlib.Path(sys.executable).parent / "tilewise"
script.write_text(f"#!{sys.executable}\nimport sys\n\nfrom tilewise.cli import main\n\nsys.exit(main())\n")
script.chmod(0o755)
# Native programs, which `python -m` only finds beside the interpreter.
for program in ("maturin", "ruff"):
    script.with_name(program).symlink_to(store / "bin" / program)
PY
echo "$stamp" >"$venv/tilewise-stamp"
