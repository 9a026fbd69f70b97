package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// vmDoc is a virtual machine in the output of holdfast vms.
type vmDoc struct {
	VM          string   `json:"vm"`
	ID          string   `json:"id"`
	UUID        string   `json:"uuid"`
	Host        string   `json:"host,omitempty"`
	Power       string   `json:"power"`
	Consistency string   `json:"consistency"` // the best that a backup can reach now
	AgentReason string   `json:"agent_reason,omitempty"`
	Incomplete  bool     `json:"incomplete"`
	Owner       string   `json:"owner,omitempty"`
	Disks       []vmDisk `json:"disks"`
}

// vmDisk says of a disk what can be done for it.
type vmDisk struct {
	ID       string `json:"id"`
	Size     int64  `json:"size"`
	Backing  string `json:"backing"`
	Format   string `json:"format,omitempty"`
	Storage  string `json:"storage,omitempty"`
	Protect  bool   `json:"protected"` // a backup can include it
	Tracking string `json:"tracking"`
	Reason   string `json:"reason,omitempty"`
	Detail   string `json:"detail,omitempty"`
}

func (p *program) vmsCommand() *cobra.Command {
	var from hypervisorFlags
	c := &cobra.Command{
		Use:   "vms --from URL",
		Short: "List virtual machines, and what of them can be protected",
		Args:  exactly(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "from", from.url); err != nil {
				return err
			}
			return p.vms(cmd.Context(), &from)
		},
	}
	from.add(c, "from", fromHelp)
	return c
}

const fromHelp = "`URL` of the hypervisor, for example qemu:///system"

func (p *program) vms(ctx context.Context, from *hypervisorFlags) error {
	hv, err := from.open(ctx, p)
	if err != nil {
		return err
	}
	defer p.closing(hv)
	info := hv.Info()
	t := &table{right: map[int]bool{3: true}}
	t.add("NAME", "STATE", "DISKS", "SIZE", "CONSISTENCY", "NOTES")
	n := 0
	for vm, err := range hv.VMs(ctx, hypervisor.Query{}) {
		if err != nil {
			return fmt.Errorf("the list of virtual machines is not complete: %w", err)
		}
		n++
		d := describeVM(vm, info)
		if p.json {
			p.emit(d)
			continue
		}
		t.add(vmRow(d)...)
	}
	p.say("%s %s at %s: %s", info.Product, info.Version, info.Endpoint, plural(n, "virtual machine", "virtual machines"))
	if n > 0 {
		t.print(p.say)
	}
	return nil
}

func describeVM(vm *hypervisor.VM, info hypervisor.Info) vmDoc {
	d := vmDoc{
		VM: vm.Name, ID: string(vm.ID), UUID: vm.UUID, Host: vm.Host, Power: string(vm.Power),
		Consistency: hypervisor.CrashConsistent.String(), AgentReason: vm.Guest.AgentWhy,
		Incomplete: vm.Incomplete, Owner: vm.Owner, Disks: []vmDisk{},
	}
	if vm.Guest.Agent {
		d.Consistency = info.Capabilities.MaxConsistency.String()
	}
	for _, x := range vm.Disks {
		d.Disks = append(d.Disks, vmDisk{
			ID: string(x.ID), Size: x.Size, Backing: string(x.Backing), Format: x.Format, Storage: x.Storage,
			Protect: x.Snapshottable, Tracking: string(x.Tracking), Reason: string(x.Reason), Detail: x.Detail,
		})
	}
	return d
}

func vmRow(d vmDoc) []string {
	var size int64
	var notes []string
	protected := 0
	for _, x := range d.Disks {
		switch {
		case x.Protect:
			protected++
			size += x.Size
			if x.Tracking != string(hypervisor.TrackingBlocks) {
				notes = append(notes, fmt.Sprintf("%s: no change tracking (%s)", x.ID, x.Reason))
			}
		default:
			notes = append(notes, fmt.Sprintf("%s: left out (%s)", x.ID, x.Reason))
		}
	}
	if d.AgentReason != "" && d.Power == string(hypervisor.PoweredOn) {
		notes = append(notes, d.AgentReason)
	}
	if d.Incomplete {
		notes = append(notes, "unfinished restore, holdfast recover removes it")
	}
	return []string{
		d.VM, d.Power, fmt.Sprintf("%d of %d", protected, len(d.Disks)), bytesText(size), d.Consistency,
		strings.Join(notes, "; "),
	}
}

// closing closes what was opened. What fails there has no effect on the result.
func (p *program) closing(c interface{ Close() error }) {
	if err := c.Close(); err != nil {
		p.note("warning: " + message(err))
	}
}
