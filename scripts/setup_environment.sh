#!/usr/bin/env bash
# Finds or makes the Python environment. The other scripts source this file and call one of
#
#   setup_environment run      what training and verifying need
#   setup_environment test     the same, pytest, and the optional packages that tests use (moto, s3fs, matplotlib, and
#                              Triton and torchao where there are such for the machine)
#   setup_environment check    the same, ruff and import-linter
#
# Afterwards REPOSITORY is the checkout and PYTHON the interpreter to use, and PYTHONPATH begins with the checkout, so
# that the packages run straight from it. The first call takes minutes where something must be installed, the next
# ones a fraction of a second.
#
# An interpreter that already has what is needed is used as it is: $PYTHON, or else `python3`. Otherwise it is the
# checkout's `.venv`, made with the versions of constraints.txt. Where only test tools are missing, `.venv` sees the
# interpreter's own packages, so that torch is not installed twice. Nothing outside the checkout is written.
#
# pip's own settings apply. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small CPU build of torch
# on a Linux machine without a GPU.
#
# `.venv/incomplete` exists while a new environment is being made, `.venv/installed` afterwards, with the checksum of
# the pins. An environment with other pins or one left incomplete is made anew. One that somebody made by hand has
# neither file: it is used, what it lacks is added, and it is removed only if its interpreter does not run.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_ENVIRONMENT="$REPOSITORY/.venv"

setup_environment() {
    local need="$1" base
    export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
    base="$(_find_python)" || return 1
    if _python_has "$base" "$need"; then
        PYTHON="$base"
    else
        if ! _environment_is_ready "$need"; then _lock_and_make_environment "$base" "$need" || return 1; fi
        PYTHON="$_ENVIRONMENT/bin/python"
    fi
    echo "set-up: $PYTHON with $(_describe_versions "$PYTHON")" >&2
}

_find_python() {
    local candidate path candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        path="$(type -P "$candidate")" || continue
        if [[ "$path" != /* ]]; then path="$PWD/$path"; fi
        if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$path"
            return
        fi
    done
    echo "set-up: ${PYTHON:-python3} is no Python >= 3.10; install one, or name it with PYTHON=/path/to/python." >&2
    return 1
}

# Whether an interpreter has all that a need stands for. Reads the metadata, because importing takes seconds.
_python_has() {
    "$1" - "$2" 2>/dev/null <<'CODE'
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

least_versions = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0,)}
if sys.version_info < (3, 11):
    least_versions["tomli"] = (0,)  # tomllib came with 3.11
test = ["pytest", "moto", "s3fs", "matplotlib"]
if platform.system() == "Linux" and platform.machine() == "x86_64":
    test.append("triton")
tools = {"run": [], "test": test, "check": [*test, "ruff", "importlinter"]}[sys.argv[1]]
for name, least in least_versions.items():
    try:
        numbers = re.findall(r"\d+", version(name))
    except PackageNotFoundError:
        sys.exit(1)
    if tuple(map(int, numbers[:2])) < least:
        sys.exit(1)
sys.exit(not all(map(find_spec, [*least_versions, *tools])))
CODE
}

_describe_versions() {
    "$1" - <<'CODE'
import platform
from importlib.metadata import version

print(f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}")
CODE
}

_environment_is_ready() {
    _environment_is_sound && _python_has "$_ENVIRONMENT/bin/python" "$1"
}

# Whether what is there may be kept: it runs, nothing broke off, and it was not installed from other pins.
_environment_is_sound() {
    [[ ! -e "$_ENVIRONMENT/incomplete" ]] || return 1
    "$_ENVIRONMENT/bin/python" -c '' 2>/dev/null || return 1
    [[ ! -e "$_ENVIRONMENT/installed" || "$(<"$_ENVIRONMENT/installed")" == "$(_checksum_of_pins)" ]]
}

# Only what stands before the first [tool.*] table of pyproject.toml says what is installed.
_checksum_of_pins() {
    { cat "$REPOSITORY/constraints.txt" && sed '/^\[tool\./,$d' "$REPOSITORY/pyproject.toml"; } | cksum
}

# Several processes may come here at once (the tasks of a node, two terminals): one works and the others wait. The
# lock lies beside `.venv`, because that is removed, and ends with the subshell.
_lock_and_make_environment() {
    (
        if command -v flock >/dev/null; then flock 9; fi
        if ! _environment_is_ready "$2"; then _make_environment "$1" "$2"; fi
    ) 9>"$REPOSITORY/.venv.lock"
}

_make_environment() {
    local base="$1" need="$2" python="$_ENVIRONMENT/bin/python"
    if ! _environment_is_sound; then
        rm -rf "$_ENVIRONMENT"
        mkdir "$_ENVIRONMENT"
        touch "$_ENVIRONMENT/incomplete"
        _make_bare_environment "$base"
    fi
    if ! _python_has "$python" run; then
        echo "set-up: installing the versions of constraints.txt into $_ENVIRONMENT (takes minutes, once)" >&2
        # torch first and alone: asked for at one exact version, pip fetches one build of it (they have gigabytes) and
        # finds it in place when it works out the rest.
        _pip_install torch
        _pip_install --editable "$REPOSITORY"
    fi
    if [[ "$need" != run ]]; then
        echo "set-up: installing the test tools of constraints.txt into $_ENVIRONMENT" >&2
        _pip_install pytest "moto[server,s3]" s3fs matplotlib ruff import-linter \
            'triton; platform_system == "Linux" and platform_machine == "x86_64"'
        # In a folder that only tests look into: Transformers imports torchao wherever it finds it, which takes time, and
        # on a CPU complains of libraries that it cannot load.
        _pip_install --no-deps --target "$_ENVIRONMENT/float8" \
            'torchao; platform_system == "Linux" and platform_machine == "x86_64"'
    fi
    if [[ -e "$_ENVIRONMENT/incomplete" ]]; then
        _checksum_of_pins >"$_ENVIRONMENT/installed"
        rm "$_ENVIRONMENT/incomplete"
    fi
}

# Makes `.venv` with pip in it. It sees the packages of `base` if those suffice for training, and are not in a virtual
# environment themselves (an environment made from within another sees the packages of neither).
_make_bare_environment() {
    local base="$1" options=() site_packages
    if _python_has "$base" run && "$base" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
        options=(--system-site-packages)
    fi
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv ${options[@]+"${options[@]}"} "$_ENVIRONMENT"
    else
        # Debian and Ubuntu without their python3-venv package: bring pip in with the interpreter's own pip.
        "$base" -m venv --without-pip ${options[@]+"${options[@]}"} "$_ENVIRONMENT"
        site_packages="$("$_ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        "$base" -m pip install --quiet --target "$site_packages" pip
    fi
}

# pip shows its progress to a person and keeps quiet in a log. -I keeps the checkout itself, which the working directory
# and PYTHONPATH may lead to, out of what pip takes for installed.
_pip_install() {
    local quiet=(--quiet)
    if [[ -t 2 ]]; then quiet=(); fi
    "$_ENVIRONMENT/bin/python" -I -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
        --constraint "$REPOSITORY/constraints.txt" "$@" >&2
}
