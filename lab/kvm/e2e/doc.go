// Package e2e holds the acceptance tests of the KVM slice: they drive the built
// command against a real libvirtd and QEMU, and compare what comes back with a
// truth that was taken by other tools. They need the lab (HOLDFAST_LAB_KVM).
package e2e
