#!/bin/sh
# Installs what the tests need beside Rust: etcd (into .test-servers/bin), UCX and NVRTC (into .test-servers/ucx and .test-servers/nvrtc; where
# they cannot be had, tests of them are skipped and say so), Python environments (into .venv and .test-servers/frameworks) and clients for Node (into
# tests/clients/node_modules). Says what it does; quick when all is there. Needs no root where Python can make environments and Node is
# installed, and no package index: if there is none yet, it fetches one.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
servers=$root/.test-servers
clients=$root/tests/clients

say() { printf 'install: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }
has() { command -v "$1" >/dev/null; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Options for apt-get; without root, update_index makes it use an index of our own.
apt_options=

update_index() {
    say "apt-get update: there is no (recent) package index"
    if ! is_root; then
        mkdir -p "$work/lists/partial" "$work/archives/partial"
        apt_options="-o Dir::State::lists=$work/lists -o Dir::Cache=$work -o Debug::NoLocking=true"
    fi
    # shellcheck disable=SC2086 # several words
    apt-get -qq $apt_options update || die "apt-get update does not work here"
}

# Downloads Debian's etcd into the current folder.
download_etcd() {
    # shellcheck disable=SC2086 # several words
    apt-get -qq $apt_options download etcd-server
}

# Takes etcd out of Debian's package without installing it: no service starts, and no root is needed.
unpack_etcd() {
    has apt-get && has dpkg-deb || die "etcd is missing and this is no Debian: put etcd 3.4 or newer into the search path"
    cd "$work"
    download_etcd >/dev/null 2>&1 || { update_index && download_etcd 2>/dev/null; } || die "Debian's etcd-server cannot be downloaded"
    dpkg-deb -x etcd-server_*.deb package
    mkdir -p "$servers/bin"
    cp package/usr/bin/etcd "$servers/bin/etcd.new"
    mv "$servers/bin/etcd.new" "$servers/bin/etcd"
    cd "$root"
}

install_venv_package() {
    is_root && has apt-get || die "$1: install python3 with its module venv (Debian: python3-venv)"
    say "$1: installing Debian's python3-venv"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq install -y python3-venv >/dev/null 2>&1 || { update_index && apt-get -qq install -y python3-venv >/dev/null; } \
        || die "python3-venv cannot be installed"
}

# Makes the environment $1 from the requirements $2.
make_venv() {
    has python3 || install_venv_package "python3 is missing"
    say "making the Python environment ${1#"$root/"} with $(python3 --version)"
    if ! python3 -m venv --clear "$1" >/dev/null 2>&1; then
        install_venv_package "python3 cannot make environments"
        python3 -m venv --clear "$1"
    fi
    "$1/bin/pip" install --quiet --disable-pip-version-check -r "$2" || die "pip cannot install $2"
    cp "$2" "$1/.requirements"
    say "installed $(grep -v '^#' "$2" | tr '\n' ' ')"
}

# An environment is complete when it was made from these very requirements.
need_venv() {
    if cmp -s "$2" "$1/.requirements" && "$1/bin/python" -c '' 2>/dev/null; then
        say "the Python environment in ${1#"$root/"} is complete"
    else
        make_venv "$1" "$2"
    fi
}

install_node() {
    is_root && has apt-get || die "install node 18 or newer, with npm (Debian: nodejs npm)"
    say "node is missing: installing Debian's nodejs and npm"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq install -y nodejs npm >/dev/null 2>&1 || { update_index && apt-get -qq install -y nodejs npm >/dev/null; } \
        || die "nodejs and npm cannot be installed"
}

# Node's modules are complete when they were installed from this very lock file.
need_node_modules() {
    has npm || install_node
    if cmp -s "$clients/package-lock.json" "$clients/node_modules/.lock"; then
        say "the clients for Node in tests/clients/node_modules are complete"
        return
    fi
    say "installing the clients for Node $(node --version) into tests/clients/node_modules"
    (cd "$clients" && npm ci --silent --no-audit --no-fund) || die "npm cannot install what tests/clients/package-lock.json names"
    cp "$clients/package-lock.json" "$clients/node_modules/.lock"
}

# Takes the libraries and headers out of PyPI's libucx-cu12, which needs neither CUDA nor RDMA: Debian 12 has UCX 1.13, which
# aborts when a peer dies while it connects.
unpack_ucx() {
    "$root/.venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$work" libucx-cu12==1.18.1 || return 1
    "$root/.venv/bin/python" -m zipfile -e "$work"/libucx_cu12-*.whl "$work/wheel"
    rm -rf "$servers/ucx"
    mkdir -p "$servers/ucx/lib/ucx"
    cp -R "$work/wheel/libucx/include" "$servers/ucx/"
    cp "$work/wheel/libucx/lib"/*.so.0 "$servers/ucx/lib/"
    cp "$work/wheel/libucx/lib/ucx"/*.so.0 "$servers/ucx/lib/ucx/"
}

# Takes NVIDIA's compiler out of PyPI's nvidia-cuda-nvrtc: it needs no card. The version is the one that kernels/resources.txt is of.
unpack_nvrtc() {
    "$root/.venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$work" nvidia-cuda-nvrtc==13.0.88 || return 1
    "$root/.venv/bin/python" -m zipfile -e "$work"/nvidia_cuda_nvrtc-*.whl "$work/nvrtc"
    rm -rf "$servers/nvrtc"
    mkdir -p "$servers/nvrtc"
    cp "$work/nvrtc/nvidia/cu13/lib/libnvrtc.so.13" "$work/nvrtc/nvidia/cu13/lib/libnvrtc-builtins.so.13.0" "$servers/nvrtc/"
}

if [ -x "$servers/bin/etcd" ]; then
    say "etcd is in .test-servers/bin"
elif has etcd; then
    say "etcd is in the search path: $(command -v etcd)"
else
    say "taking etcd from Debian's package etcd-server into .test-servers/bin"
    unpack_etcd
    say "$("$servers/bin/etcd" --version | head -n 1)"
fi

need_venv "$root/.venv" "$root/tests/servers/requirements.txt"

if [ -e "$servers/ucx/lib/libucp.so.0" ]; then
    say "UCX is in .test-servers/ucx"
elif unpack_ucx; then
    say "took UCX from libucx-cu12 into .test-servers/ucx"
else
    say "UCX cannot be had here: tests of transport ucx will be skipped"
fi

if [ -e "$servers/nvrtc/libnvrtc.so.13" ]; then
    say "NVRTC is in .test-servers/nvrtc"
elif unpack_nvrtc; then
    say "took NVRTC from nvidia-cuda-nvrtc into .test-servers/nvrtc"
else
    say "NVRTC cannot be had here: kernels will not be compiled for cards"
fi

need_venv "$servers/frameworks" "$root/tests/servers/frameworks.txt"
need_node_modules
