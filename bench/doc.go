//go:build linux

// Command bench compares Holdfast with its peers on one running QEMU disk, in one
// run, and writes the table of docs/performance.md. It needs the lab (lab/kvm/up),
// the peers from Debian (virtnbdbackup, restic, borgbackup, qemu-utils,
// libnbd-bin) and the kopia program from tools. Figures are medians of interleaved
// runs; only ratios are worth quoting.
package main
