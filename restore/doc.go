// Package restore brings restore points back: as new VMs on a hypervisor that is
// a Target, and as disk image files. Every byte that is written was compared with
// the digest tree that was computed when it left its hypervisor; a disk that does
// not match is an error, and what was begun is removed.
package restore
