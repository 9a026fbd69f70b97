package fakes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

// World is a virtualisation platform in memory: what stays when a process that
// talks to it dies. It is safe for concurrent use.
type World struct {
	opts  Options
	clock clock.Clock

	mu       sync.Mutex
	rnd      *rand.Rand
	vms      map[hypervisor.VMID]*vmState
	storages map[string]int64 // capacity in bytes, 0: without limit
	networks map[string]bool
	nextID   int
	calls    int
	open     map[*handle]struct{} // readers and writers
}

// vmState is a VM. Its fields are guarded by World.mu.
type vmState struct {
	id       hypervisor.VMID
	cfg      VMConfig
	power    hypervisor.PowerState
	disks    []*diskState
	guest    Guest
	frozen   bool
	frozenAt time.Time
	owner    string
	unready  bool // incomplete
	snaps    map[string]*snapState
	anchors  map[string]*anchorSet // retained baselines by owner name
}

// diskState is what is plugged into a slot.
type diskState struct {
	cfg     DiskConfig
	content string
	slot    int
	img     *image
	track   *tracker
	writer  *diskWriter
}

// anchorSet is one retained object that covers several disks.
type anchorSet struct {
	disks   map[hypervisor.DiskID]hypervisor.Baseline
	pending bool // its snapshot is not released yet
}

// NewWorld returns an empty platform with DefaultStorage and DefaultNetwork.
func NewWorld(opts Options) *World {
	if opts.Clock == nil {
		opts.Clock = clock.Real()
	}
	if opts.Granularity <= 0 {
		opts.Granularity = 64 << 10
	}
	if opts.Product == "" {
		opts.Product = "fakes"
	}
	if opts.Endpoint == "" {
		opts.Endpoint = "memory"
	}
	return &World{
		opts: opts, clock: opts.Clock,
		rnd:      rand.New(rand.NewPCG(opts.Seed, 0x686f6c6466617374)),
		vms:      map[hypervisor.VMID]*vmState{},
		storages: map[string]int64{DefaultStorage: 0},
		networks: map[string]bool{DefaultNetwork: true},
		open:     map[*handle]struct{}{},
	}
}

// Connect returns a new connection. Connections share nothing but the World.
func (w *World) Connect() *Hypervisor { return &Hypervisor{world: w} }

// NewHypervisor returns a connection to a new World; see Hypervisor.World.
func NewHypervisor(opts Options) *Hypervisor { return NewWorld(opts).Connect() }

// AddStorage makes a place for disks with a capacity in bytes; zero means
// without limit. Disks count with their full size.
func (w *World) AddStorage(name string, capacity int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.storages[name] = capacity
}

// AddNetwork makes a network that NICs can be connected to.
func (w *World) AddNetwork(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.networks[name] = true
}

// AddVM makes a VM as an administrator would and returns its ID.
func (w *World) AddVM(cfg VMConfig) hypervisor.VMID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.addVM(cfg).id
}

func (w *World) addVM(cfg VMConfig) *vmState {
	w.nextID++
	v := &vmState{
		id: hypervisor.VMID(fmt.Sprintf("vm-%d", w.nextID)), cfg: cfg, guest: cfg.Guest,
		power: cfg.Power, owner: cfg.Owner,
		snaps: map[string]*snapState{}, anchors: map[string]*anchorSet{},
	}
	if v.power == "" {
		v.power = hypervisor.PoweredOn
	}
	v.cfg.UUID = strings.ToLower(v.cfg.UUID)
	if v.cfg.UUID == "" {
		v.cfg.UUID = w.newUUID()
	}
	v.cfg.Hardware = defaultHardware(cfg.Hardware)
	v.cfg.Tags = maps.Clone(cfg.Tags)
	v.cfg.NVRAM = bytes.Clone(cfg.NVRAM)
	v.cfg.NICs = slices.Clone(cfg.NICs)
	for i := range v.cfg.NICs {
		n := &v.cfg.NICs[i]
		n.ID = orElse(n.ID, fmt.Sprintf("nic%d", i))
		n.MAC = strings.ToLower(orElse(n.MAC, w.newMAC()))
		n.Network = orElse(n.Network, DefaultNetwork)
		n.Model = orElse(n.Model, "virtio")
	}
	v.cfg.Disks = nil
	for i, d := range cfg.Disks {
		if d.ID == "" {
			d.ID = hypervisor.DiskID(fmt.Sprintf("disk%d", i))
		}
		v.disks = append(v.disks, w.newDisk(d, i))
	}
	if v.cfg.Native.Format == "" {
		v.cfg.Native = hypervisor.NativeConfig{
			Format: "fake-json",
			Data:   fmt.Appendf(nil, `{"name":%q,"uuid":%q}`, v.cfg.Name, v.cfg.UUID),
		}
	}
	w.vms[v.id] = v
	return v
}

func defaultHardware(h hypervisor.Hardware) hypervisor.Hardware {
	if h.CPUs == 0 {
		h.CPUs = 2
	}
	if h.CoresPerSocket == 0 {
		h.CoresPerSocket = 1
	}
	if h.MemoryBytes == 0 {
		h.MemoryBytes = 2 << 30
	}
	if h.Firmware == "" {
		h.Firmware = hypervisor.BIOS
	}
	h.Arch = orElse(h.Arch, "x86_64")
	h.Machine = orElse(h.Machine, "fake-1")
	h.Boot = slices.Clone(h.Boot)
	return h
}

func orElse(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

func (w *World) newDisk(cfg DiskConfig, slot int) *diskState {
	w.nextID++
	if cfg.Backing == "" {
		cfg.Backing = hypervisor.File
	}
	cfg.Bus = orElse(cfg.Bus, "virtio")
	cfg.Format = orElse(cfg.Format, "fake")
	cfg.Storage = orElse(cfg.Storage, DefaultStorage)
	return &diskState{
		cfg: cfg, slot: slot, content: fmt.Sprintf("content-%d-%08x", w.nextID, w.rnd.Uint32()),
		img: newImage(cfg.Size), track: newTracker(w.opts.Granularity),
	}
}

func (w *World) newUUID() string {
	a, b := w.rnd.Uint64(), w.rnd.Uint64()
	return fmt.Sprintf("%08x-%04x-4%03x-%04x-%012x",
		a>>32, a>>16&0xffff, a&0xfff, 0x8000|b>>48&0x3fff, b&0xffffffffffff)
}

func (w *World) newMAC() string {
	n := w.rnd.Uint32()
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", n>>16&0xff, n>>8&0xff, n&0xff)
}

// find returns the VM and, when disk is not empty, the disk.
func (w *World) find(id hypervisor.VMID, disk hypervisor.DiskID) (*vmState, *diskState, error) {
	v := w.vms[id]
	if v == nil {
		return nil, nil, fmt.Errorf("VM %s: %w", id, hypervisor.ErrNotFound)
	}
	if disk == "" {
		return v, nil, nil
	}
	for _, d := range v.disks {
		if d.cfg.ID == disk {
			return v, d, nil
		}
	}
	return nil, nil, fmt.Errorf("disk %s of VM %s: %w", disk, id, hypervisor.ErrNotFound)
}

// definition returns the VM as data of its own.
func (w *World) definition(v *vmState) *hypervisor.VM {
	vm := &hypervisor.VM{
		ID: v.id, UUID: v.cfg.UUID, Name: v.cfg.Name, Host: v.cfg.Host, Power: v.power,
		Hardware: v.cfg.Hardware, NICs: slices.Clone(v.cfg.NICs), Tags: maps.Clone(v.cfg.Tags),
		Guest: hypervisor.GuestInfo{OS: v.guest.OS, Family: v.guest.Family},
		Owner: v.owner, Incomplete: v.unready,
	}
	vm.Hardware.Boot = slices.Clone(v.cfg.Hardware.Boot)
	vm.Native = hypervisor.NativeConfig{Format: v.cfg.Native.Format, Data: bytes.Clone(v.cfg.Native.Data)}
	vm.Guest.AgentWhy = v.agentWhy(&w.opts)
	vm.Guest.Agent = vm.Guest.AgentWhy == ""
	if v.cfg.NVRAM != nil {
		data := bytes.Clone(v.cfg.NVRAM)
		vm.Attachments = append(vm.Attachments, hypervisor.Attachment{
			Name: "nvram", Kind: "nvram", Size: int64(len(data)),
			Open: func(ctx context.Context) (io.ReadCloser, error) {
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				return io.NopCloser(bytes.NewReader(data)), nil
			},
		})
	}
	for _, d := range v.disks {
		vm.Disks = append(vm.Disks, d.definition(&w.opts))
	}
	return vm
}

func (d *diskState) definition(opts *Options) hypervisor.Disk {
	snapshot, tracking, why := d.cfg.classify(opts)
	return hypervisor.Disk{
		ID: d.cfg.ID, Content: d.content, Size: d.img.size, Backing: d.cfg.Backing,
		Attrs: d.cfg.Attrs, Bus: d.cfg.Bus, Controller: d.cfg.Bus + "0", Slot: d.slot,
		Storage: d.cfg.Storage, Format: d.cfg.Format,
		Snapshottable: snapshot, Tracking: tracking, Reason: why,
	}
}

// agentWhy returns why the guest cannot be quiesced now, or "".
func (v *vmState) agentWhy(opts *Options) string {
	switch {
	case opts.NoQuiesce:
		return "this platform cannot quiesce guests"
	case !v.guest.Agent:
		return orElse(v.guest.Why, "no guest agent answers")
	case v.power != hypervisor.PoweredOn:
		return "the guest is not running"
	}
	return ""
}

// errClosed is what a connection answers after Close.
var errClosed = errors.New("connection is closed")
