// Package kvm drives virtual machines of a libvirt daemon with QEMU.
//
// A snapshot is a libvirt backup job in pull mode: QEMU keeps the old content of
// blocks that the guest overwrites in scratch files and serves the frozen disks
// over NBD on a unix socket. A baseline is a libvirt checkpoint, made in the same
// instant; QEMU's dirty bitmaps behind it tell the next job what changed. qcow2
// disks of version 3 are tracked; all other formats are read in full. A domain
// that is off is started paused for the job, and destroyed afterwards.
//
// # Two connection leaves
//
// By default the daemon is spoken to in pure Go (go-libvirt). With the build tag
// libvirt_dlopen, on Linux with cgo, the official binding is used, which loads
// libvirt.so.0 at run time. [hypervisor.Info].Transport names the one in use.
//
// # What stays on the host
//
// Scratch files and sockets carry the owner name of the run and the UUID of the
// domain, so that another process finds them; they go with the snapshot. In the
// domain's metadata, under one namespace, stand: that a domain was started by a
// run, that its guest was told to freeze, which disks of a checkpoint nobody needs
// any more, and for restored domains who made them and whether they are complete.
package kvm
