// Package kvmlab gives tests virtual machines on a real libvirtd and QEMU.
//
// It drives virsh and the qemu tools, with a deadline on every call, and so
// shares no code with the KVM driver whose tests use it. A virtual machine needs
// no guest: "guest writes" go through the QEMU monitor into the device's block
// backend, where they meet the same copy-before-write filter and dirty bitmaps as
// a guest's. For agent tests [Guest] boots a small Linux with a real qemu-ga.
//
// Every name carries a prefix of the one [Lab], and cleanup filters by it: a
// domain, loop device, mount or file of anybody else is never touched.
//
// Tests get their lab with [Connect], which skips unless HOLDFAST_LAB_KVM holds a
// libvirt URL. Methods that take no error back stop the test (testing.TB.Fatal)
// and belong to the test's goroutine; those named Try return the error and may be
// called from any goroutine.
package kvmlab
