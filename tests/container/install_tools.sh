#!/usr/bin/env bash
# Install what the system tests call and this machine lacks: Debian packages, without a question.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive PATH="$PATH:/usr/sbin:/sbin"

declare -A package_of=([buildah]=buildah [debootstrap]=debootstrap [promtool]=prometheus
    [node]=nodejs [npm]=npm [java]=default-jdk-headless [curl]=curl
    [nginx]=nginx-light [haproxy]=haproxy [caddy]=caddy [openssl]=openssl [tmux]=tmux [zsh]=zsh
    [fish]=fish)
missing=()
for command in "${!package_of[@]}"; do
    command -v "$command" >/dev/null || missing+=("${package_of[$command]}")
done
# The one that draws no window is quicker; where the whole browser is there, it has to do.
command -v chromium-headless-shell >/dev/null || command -v chromium >/dev/null ||
    missing+=(chromium-headless-shell)
# The page's screenshots are compared by eye: with the same letters everywhere.
[ -d /usr/share/fonts/opentype/inter ] || [ -d /usr/share/fonts/truetype/inter ] || missing+=(fonts-inter)
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi

refuse() {
    echo "make test-system: $1 (missing: ${missing[*]})." >&2
    exit 1
}
command -v apt-get >/dev/null ||
    refuse "there is no apt-get here; install what is missing by your system's own means"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || refuse "installing needs root; run it as root"
    as_root=(sudo -n --preserve-env=DEBIAN_FRONTEND)
fi

# The tests want promtool, not a Prometheus that runs from now on: packages start nothing while
# this file says so.
policy=/usr/sbin/policy-rc.d
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if [ ! -e "$policy" ]; then
    trap 'rm -f "$log"; "${as_root[@]}" rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod +x "$policy"
fi
echo "Installing ${missing[*]}."
apt=("${as_root[@]}" apt-get --quiet --option DPkg::Lock::Timeout=300)
update_and_install() {
    "${apt[@]}" update || return
    # A release without the browser that draws no window has the whole one.
    apt-cache show chromium-headless-shell >/dev/null ||
        missing=("${missing[@]/chromium-headless-shell/chromium}")
    "${apt[@]}" install --yes --no-install-recommends "${missing[@]}"
}
if ! update_and_install >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    refuse "apt-get could not install; what it said last stands above"
fi
