# shellcheck shell=bash
# What the scripts share: becoming root for a step, installing packages, tools from crates.io.
# Sourced, not run. It changes nothing by being sourced.

# The project's folder, whatever the caller's.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Runs a command as root: directly, or with sudo.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "'$*' needs root, and sudo is not installed: run this as root"
    fi
}

# Installs the Debian packages among "$@" that are missing.
need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' \
            || missing+=("$package")
    done
    [ "${#missing[@]}" -eq 0 ] && return 0
    command -v apt-get >/dev/null \
        || die "install these with your package manager, then run this again: ${missing[*]}"
    say "Installing ${missing[*]}"
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "${missing[@]}"
}

need_cargo() {
    if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    command -v cargo >/dev/null \
        || die "a Rust toolchain is needed: see https://rustup.rs, then run this again"
}

# Makes sure that /dev/fuse is there.
need_fuse() {
    [ -e /dev/fuse ] || as_root modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || die "/dev/fuse is missing: this machine (or container) has no FUSE"
}

# need_tool NAME VERSION: a test tool from crates.io, kept under target/tools.
need_tool() {
    tools=$project/target/tools
    if [ "$("$tools/bin/$1" --version 2>/dev/null | awk '{print $NF}')" != "$2" ]; then
        say "Building $1 $2"
        # Each tool has its own lock file; the project's settings are not its settings.
        (cd / && cargo install --quiet --locked --root "$tools" --version "$2" "$1")
    fi
}

# Makes two ordinary users for tests that need somebody else.
need_users() {
    local name
    for name in rvtest1 rvtest2; do
        getent passwd "$name" >/dev/null \
            || as_root useradd --user-group --create-home "$name" || getent passwd "$name" >/dev/null
    done
}

# ---- Arenas: a plain ext4 beside a mount of ours over two ext4 images, for comparing them.

arena=
arena_mounts=()

# Takes down what arena_up made; safe to call twice.
arena_down() {
    local failed=0 index
    [ -n "$arena" ] || return 0
    cd /
    if mountpoint -q "$arena/mirror"; then
        "$rearview" umount "$arena/mirror" || { umount -l "$arena/mirror"; failed=1; }
    fi
    for ((index = ${#arena_mounts[@]} - 1; index >= 0; index--)); do
        umount "${arena_mounts[$index]}" || { umount -l "${arena_mounts[$index]}"; failed=1; }
    done
    rm -rf "$arena"
    arena=
    arena_mounts=()
    [ "$failed" -eq 0 ] || die "something was still in use at the end"
}

# arena_up MIB: $arena/plain is an ext4, $arena/mirror a mount of ours over two more.
arena_up() {
    local base=/dev/shm name
    [ -d "$base" ] || base=${TMPDIR:-/tmp}
    arena=$(mktemp -d "$base/rearview-arena-XXXXXX")
    chmod 755 "$arena"
    trap arena_down EXIT
    for name in plain a b; do
        mkdir "$arena/$name"
        truncate -s "$1M" "$arena/$name.img"
        mkfs.ext4 -q -F -m 0 "$arena/$name.img"
        mount -o loop "$arena/$name.img" "$arena/$name"
        arena_mounts+=("$arena/$name")
        chmod 755 "$arena/$name"
    done
    mkdir "$arena/mirror"
    "$rearview" mount -o allow_other,dev,suid "$arena/a/backing" "$arena/b/backing" "$arena/mirror"
}

# Where the binary under test is; built if none is named.
need_rearview() {
    rearview=${REARVIEW:-}
    if [ -z "$rearview" ]; then
        (cd "$project" && cargo build --quiet --release --locked)
        rearview=${CARGO_TARGET_DIR:-$project/target}/release/rearview
    fi
    [ -x "$rearview" ] || die "$rearview cannot be run"
}

# Compares the two backings after an unmount; .rearview is each replica's own.
arena_compare() {
    local difference
    "$rearview" umount "$arena/mirror"
    difference=$(rsync -naAXHi --checksum --modify-window=-1 --delete --omit-dir-times --exclude=/.rearview \
        --exclude=/lost+found "$arena/a/backing/" "$arena/b/backing/")
    [ -z "$difference" ] || { printf '%s\n' "$difference" >&2; die "the replicas differ"; }
}
