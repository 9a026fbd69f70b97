//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/drivers/kvm"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
	"github.com/holdfast-backup/holdfast/restore"
	"github.com/holdfast-backup/holdfast/secret"
)

// envOrder makes the test binary the process that dies: it holds an order.
const envOrder = "HOLDFAST_B4_ORDER"

// The operations of an order.
const (
	opBackup  = "backup"
	opRestore = "restore"
	opRecover = "recover"
)

// order is what a child does, on the driver, the pipelines and the repository of
// the product, and when it dies.
type order struct {
	Op      string
	URI     string
	Scratch string
	Storage string // of new VMs
	Repo    string
	State   string
	// Endpoint is what goes into the journal: it must be one that the command can
	// open, for that is what recovers.
	Endpoint string

	VM      hypervisor.VMID // to back up
	Quiesce backup.Quiesce
	TTL     time.Duration // of the lease

	Point repository.PointID // to restore
	Name  string             // of the new VM

	Kill *moment // nil: never; the calls are listed
	Log  string  // file that gets the calls, or the one that is deadly
}

// password is that of every repository of these tests.
const password = "correct horse battery staple"

func (o *order) run() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	log, err := os.Create(o.Log)
	if err != nil {
		return err
	}
	w := &wire{kill: o.Kill, log: log, fatal: map[uint32]bool{}}
	repo, err := kopiarepo.Open(ctx, kopiarepo.Config{Dir: o.Repo, Password: secret.New(password)})
	if err != nil {
		return err
	}
	defer repo.Close()
	connect := func(ctx context.Context, _ string) (hypervisor.Hypervisor, error) {
		return kvm.Open(ctx, kvm.Config{URI: o.URI, ScratchDir: o.Scratch, StorageDir: o.Storage, Dialer: w.dial})
	}
	if o.Op == opRecover {
		done, err := backup.Recover(ctx, backup.RecoverOptions{
			StateDir: o.State, Location: o.Repo, Connect: connect,
			OpenRepository: func(context.Context, string) (repository.Repository, error) { return repo, nil },
		})
		for _, d := range done {
			if err == nil {
				err = d.Err
			}
		}
		return err
	}
	hv, err := connect(ctx, o.URI)
	if err != nil {
		return err
	}
	defer hv.Close()
	switch o.Op {
	case opBackup:
		_, err = backup.Run(ctx, hv, repo, o.VM, &backup.Options{
			Quiesce: o.Quiesce, StateDir: o.State, Endpoint: o.Endpoint, Location: o.Repo, LeaseTTL: o.TTL,
		})
	case opRestore:
		target, ok := hv.(hypervisor.Target)
		if !ok {
			return fmt.Errorf("%T is no target", hv)
		}
		_, err = restore.ToVM(ctx, repo, o.Point, target, &restore.VMOptions{Name: o.Name},
			&restore.Options{StateDir: o.State, Endpoint: o.Endpoint, Location: o.Repo})
	default:
		err = fmt.Errorf("no operation %q", o.Op)
	}
	return err
}

// obey runs the order in the environment and returns the exit code.
func obey(text string) int {
	var o order
	err := json.Unmarshal([]byte(text), &o)
	if err == nil {
		err = o.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
