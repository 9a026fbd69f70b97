package backup_test

import (
	"context"
	"fmt"
	"log"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/restore"
)

// A VM is backed up in full, then incrementally, and comes back as a copy. With
// another driver and another repository the program is the same.
func Example() {
	ctx := context.Background()
	world := fakes.NewWorld(fakes.Options{Seed: 1})
	vm := world.AddVM(fakes.VMConfig{Name: "web1", Disks: []fakes.DiskConfig{{ID: "vda", Size: 64 << 20}}})
	hv := world.Connect()
	repo := fakes.NewRepository(fakes.RepositoryOptions{Seed: 1})

	if err := world.GuestWrite(vm, "vda", 0, []byte("hello")); err != nil {
		log.Fatal(err)
	}
	for _, text := range []string{"full", "incremental"} {
		res, err := backup.Run(ctx, hv, repo, vm, nil)
		if err != nil {
			log.Fatal(text, " ", err)
		}
		d := res.Disks[0]
		fmt.Println(res.Status(), d.ID, d.Mode, d.Reason, d.ReadBytes>>20, "MiB read")
		if err := world.GuestWrite(vm, "vda", 5<<20, []byte("more")); err != nil {
			log.Fatal(err)
		}
		if text == "incremental" {
			back, err := restore.ToVM(ctx, repo, res.Point(), hv, &restore.VMOptions{Name: "web1-copy"}, nil)
			if err != nil {
				log.Fatal(err)
			}
			copied, _ := hypervisor.Find(ctx, hv, "web1-copy")
			fmt.Println(copied.Name, "verified:", back.Disks[0].Verified)
		}
	}
	// Output:
	// success vda full first 1 MiB read
	// success vda incremental changed-blocks 1 MiB read
	// web1-copy verified: true
}
