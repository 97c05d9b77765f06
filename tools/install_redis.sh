#!/usr/bin/env bash
# Installs redis-server with apt-get where it is missing and that is allowed; else says what to do.
set -euo pipefail

if command -v redis-server >/dev/null; then
    exit 0
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    echo "redis-server is missing. Install it with your system's packages (Debian and Ubuntu: apt-get install" >&2
    echo "redis-server; Fedora: dnf install redis; macOS: brew install redis) and say make again." >&2
    exit 1
fi
echo "Installing redis-server ..."
install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends redis-server)
# The package lists of a fresh image are empty.
"${install[@]}" >/dev/null 2>&1 || { "${as_root[@]}" apt-get update --quiet >/dev/null; "${install[@]}" >/dev/null; }
redis-server --version
