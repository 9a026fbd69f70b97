package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
)

// truth is the content of a disk at one instant.
type truth interface {
	io.ReaderAt
	Size() int64
}

// demoSite is the simulated hypervisor of the demo, with one virtual machine. Its
// sizes are not whole blocks, as real ones are not.
type demoSite struct {
	world *fakes.World
	hv    *fakes.Hypervisor
	vm    hypervisor.VMID
	rnd   *rand.Rand
	nvram []byte

	marks byte // how often it was disturbed

	mu     sync.Mutex
	frozen map[hypervisor.DiskID]truth // when the guest was last frozen
	ferr   error
}

const (
	demoSystem = hypervisor.DiskID("system")
	demoData   = hypervisor.DiskID("data")
	demoName   = "demo-web"

	demoSystemSize = 160<<20 + 3*512
	demoDataSize   = 96<<20 - 5*512
)

func demoDisks() []hypervisor.DiskID { return []hypervisor.DiskID{demoSystem, demoData} }

func newDemoSite(p *program, seed uint64) (*demoSite, error) {
	s := &demoSite{rnd: rand.New(rand.NewPCG(seed, 0x64656d6f)), nvram: make([]byte, 540672)}
	s.world = fakes.NewWorld(fakes.Options{Clock: p.clock, Seed: seed, Product: "simulated hypervisor", Endpoint: "this process"})
	s.hv = s.world.Connect()
	for i := 0; i < len(s.nvram); i += 4096 {
		s.nvram[i] = byte(s.rnd.Uint32())
	}
	s.vm = s.world.AddVM(fakes.VMConfig{
		Name:     demoName,
		Hardware: hypervisor.Hardware{Firmware: hypervisor.UEFI},
		Disks:    []fakes.DiskConfig{{ID: demoSystem, Size: demoSystemSize}, {ID: demoData, Size: demoDataSize}},
		NICs:     []hypervisor.NIC{{}},
		NVRAM:    s.nvram,
		Guest:    fakes.Guest{OS: "demo Linux", Family: "linux", Agent: true, OnFreeze: s.noteTruth},
	})
	return s, s.fill()
}

// noteTruth runs when the guest has frozen: what the disks hold now is what the
// restore point must hold.
func (s *demoSite) noteTruth() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frozen, s.ferr = map[hypervisor.DiskID]truth{}, nil
	for _, id := range demoDisks() {
		b, err := s.world.Bytes(s.vm, id)
		if err != nil {
			s.ferr = err
			return
		}
		s.frozen[id] = b
	}
}

func (s *demoSite) atFreeze() map[hypervisor.DiskID]truth {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.frozen
}

func (s *demoSite) size() int64 { return demoSystemSize + demoDataSize }

func (s *demoSite) describe() string {
	return fmt.Sprintf("%s: disks of %s and %s that are no whole number of blocks, UEFI variables, a guest agent",
		demoName, bytesText(demoSystemSize), bytesText(demoDataSize))
}

// fill gives the disks what disks have: text that compresses, files that are
// there twice, data that looks random, and much that was never written.
func (s *demoSite) fill() error {
	text, noise := make([]byte, 24<<20), make([]byte, 20<<20)
	s.text(text)
	s.noise(noise)
	return errors.Join(
		s.world.GuestWrite(s.vm, demoSystem, 0, text),
		s.world.GuestWrite(s.vm, demoSystem, 40<<20, noise),
		s.world.GuestWrite(s.vm, demoSystem, 100<<20, text[:16<<20]), // a second copy of the same files
		s.world.GuestWrite(s.vm, demoSystem, demoSystemSize-512, text[:512]),
		s.world.GuestWrite(s.vm, demoData, 0, noise[:8<<20]), // a copy on another disk
		s.world.GuestWrite(s.vm, demoData, 16<<20, text[4<<20:20<<20]),
		s.world.GuestWrite(s.vm, demoData, 64<<20+4096, noise[9<<20:14<<20]),
		s.world.GuestZero(s.vm, demoData, 48<<20, 8<<20),
		s.world.GuestWrite(s.vm, demoData, demoDataSize-512, noise[:512]),
	)
}

var demoWords = []string{"backup", "restore", "the", "of", "disk", "snapshot", "error", "info", "request", "GET", "/index.html", "200", "sync", "commit", "journal", "guest"}

// text fills p with lines as logs have them.
func (s *demoSite) text(p []byte) {
	for n := 0; n < len(p); {
		n += copy(p[n:], fmt.Sprintf("%08x ", s.rnd.Uint32()))
		for range 6 + s.rnd.IntN(6) {
			n += copy(p[n:], demoWords[s.rnd.IntN(len(demoWords))]+" ")
		}
		n += copy(p[n:], "\n")
	}
}

// noise fills p with bytes that do not compress.
func (s *demoSite) noise(p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		v := s.rnd.Uint64()
		for j := range 8 {
			p[i+j] = byte(v >> (8 * j))
		}
	}
}

// work is what the guest does between two backups. It returns how many bytes it
// touched.
func (s *demoSite) work() (total int64, err error) {
	buf := make([]byte, 96<<10)
	for i := range int64(60) {
		// Guests come back to the same places: a log, a database, a few directories.
		disk, area := demoSystem, (8+i%3*37)<<20
		if i%2 == 0 {
			disk, area = demoData, (4+i%2*60)<<20
		}
		n := 512 * (1 + s.rnd.Int64N(192))
		off := area + s.rnd.Int64N(3<<20/512)*512
		switch s.rnd.IntN(6) {
		case 0:
			err = s.world.GuestZero(s.vm, disk, off, n)
		case 1:
			err = s.world.GuestDiscard(s.vm, disk, off, n)
		default:
			s.text(buf[:n])
			err = s.world.GuestWrite(s.vm, disk, off, buf[:n])
		}
		if err != nil {
			return total, err
		}
		total += n
	}
	s.noise(buf[:512])
	for _, d := range []struct {
		id   hypervisor.DiskID
		size int64
	}{{demoSystem, demoSystemSize}, {demoData, demoDataSize}} {
		if err := s.world.GuestWrite(s.vm, d.id, d.size-512, buf[:512]); err != nil {
			return total, err
		}
		total += 512
	}
	return total, nil
}

// loseTracking is a host crash: the hypervisor no longer knows what changed on
// one disk.
func (s *demoSite) loseTracking() error {
	return s.world.LoseTracking(s.vm, demoData, "")
}

// disturber is a guest that overwrites its disks while they are being backed up.
type disturber struct {
	s    *demoSite
	once sync.Once
	done chan struct{}
	n    int
	err  error
}

func (s *demoSite) disturber() *disturber { return &disturber{s: s, done: make(chan struct{})} }

// begin writes a scattering of blocks beside the backup.
func (d *disturber) begin() {
	d.once.Do(func() {
		d.s.marks++
		mark := d.s.marks
		go func() {
			defer close(d.done)
			buf := bytes.Repeat([]byte{mark}, 4096)
			for i := range int64(200) {
				disk, off := demoSystem, int64(40<<20)
				if i%2 == 0 {
					disk, off = demoData, 16<<20
				}
				off += i * 7919 * 512 % (4 << 20) // where there is data, and it is read late
				if d.err = d.s.world.GuestWrite(d.s.vm, disk, off, buf); d.err != nil {
					return
				}
				d.n++
			}
		}()
	})
}

// end waits for the last write and returns how many there were.
func (d *disturber) end() (int, error) {
	d.once.Do(func() { close(d.done) })
	<-d.done
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	return d.n, errors.Join(d.err, d.s.ferr)
}
