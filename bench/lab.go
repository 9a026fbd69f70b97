//go:build linux

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	uri = "qemu:///system"
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// lab holds the domains of the bench and removes them.
type lab struct {
	dir  string
	made []string
}

func sh(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

func virsh(args ...string) (string, error) {
	return sh("virsh", append([]string{"-q", "-c", uri}, args...)...)
}

// disk makes a qcow2 image of a size and lets fill write into it as a raw file.
func (l *lab) disk(name string, size int64, fill func(*os.File) error) (string, error) {
	raw, img := filepath.Join(l.dir, name+".raw"), filepath.Join(l.dir, name+".qcow2")
	f, err := os.Create(raw)
	if err != nil {
		return "", err
	}
	err = errors.Join(f.Truncate(size), fill(f), f.Close())
	if err == nil {
		_, err = sh("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, img)
	}
	return img, errors.Join(err, os.Remove(raw))
}

// write is a writer at an offset of a file.
type write struct {
	f   *os.File
	off int64
}

func (w *write) Write(p []byte) (int, error) {
	n, err := w.f.WriteAt(p, w.off)
	w.off += int64(n)
	return n, err
}

func fill(off, n, seed int64, how func(w io.Writer, n, seed int64) error) func(*os.File) error {
	return func(f *os.File) error {
		b := bufio.NewWriterSize(&write{f, off}, 1<<20)
		return errors.Join(how(b, n, seed), b.Flush())
	}
}

// domain defines and starts a paused domain with disks.
func (l *lab) domain(name string, images ...string) (string, error) {
	name = fmt.Sprintf("hf-bench-%d-%s", os.Getpid(), name)
	var disks strings.Builder
	for i, img := range images {
		fmt.Fprintf(&disks, `<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/><source file='%s'/><target dev='vd%c' bus='virtio'/></disk>`, img, 'a'+i)
	}
	xml := fmt.Sprintf(`<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>%s<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>`, name, disks.String())
	path := filepath.Join(l.dir, name+".xml")
	if err := os.WriteFile(path, []byte(xml), 0o600); err != nil {
		return "", err
	}
	if _, err := virsh("define", path); err != nil {
		return "", err
	}
	l.made = append(l.made, name)
	_, err := virsh("start", "--paused", name)
	return name, err
}

func (l *lab) close() {
	for _, d := range l.made {
		_, _ = virsh("destroy", d)
		_, _ = virsh("undefine", "--checkpoints-metadata", d)
	}
	_ = os.RemoveAll(l.dir)
}

// monitorWrite is a guest write of n bytes.
func monitorWrite(domain string, disk int, off, n int64, pattern int) error {
	_, err := virsh("qemu-monitor-command", domain, "--hmp",
		fmt.Sprintf(`qemu-io -d /machine/peripheral/virtio-disk%d/virtio-backend "write -P %d %d %d"`, disk, pattern, off, n))
	return err
}

// export runs do while the frozen first disk of a domain is served over NBD, for
// peers that do not speak libvirt.
func (l *lab) export(domain string, do func(url string) error) (err error) {
	sock, scratch := filepath.Join(l.dir, "peer.sock"), filepath.Join(l.dir, "peer.scratch")
	xml := filepath.Join(l.dir, "peer.xml")
	text := fmt.Sprintf(`<domainbackup mode='pull'><server transport='unix' socket='%s'/><disks><disk name='vda' backup='yes' type='file'><scratch file='%s'/></disk></disks></domainbackup>`, sock, scratch)
	if err := os.WriteFile(xml, []byte(text), 0o600); err != nil {
		return err
	}
	if _, err := virsh("backup-begin", domain, xml); err != nil {
		return err
	}
	defer func() {
		_, aerr := virsh("domjobabort", domain)
		for i := 0; aerr == nil && i < 200; i++ {
			out, jerr := virsh("domjobinfo", domain)
			if jerr != nil || strings.Contains(out, "None") {
				break
			}
		}
		err = errors.Join(err, aerr)
	}()
	return do("nbd+unix:///vda?socket=" + sock)
}
