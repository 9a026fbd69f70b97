#!/usr/bin/env bash
# Prints where the software bill of materials of the command was written. It is
# made of what is linked into the command, built as a release is.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${1:-holdfast.cdx.json}
CGO_ENABLED=0 "$go" build -trimpath -buildvcs=false -o "$work/holdfast" ./cmd/holdfast
"$go" mod graph >"$work/graph"
"$go" run ./.ci/sbom "$work/holdfast" <"$work/graph" >"$work/bom"
mv "$work/bom" "$out"
printf 'sbom: %s, %s components\n' "$out" "$(grep -c '"type": "library"' "$out")"
