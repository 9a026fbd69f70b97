package nbd_test

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/holdfast-backup/holdfast/nbd"
)

// text is the smallest backend: a size and reads.
type text struct{ *strings.Reader }

// Example serves a disk and reads it through a connection in memory. With a real server only Network and
// Address, or ParseURL, are needed.
func Example() {
	ctx := context.Background()
	server, err := nbd.NewServer(nbd.ServerConfig{
		Exports: nbd.ExportMap{"disk": {Backend: text{strings.NewReader("bytes of a disk")}}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = server.Close() }()

	client, err := nbd.Dial(ctx, nbd.Config{
		Network: "memory", Address: "server", Export: "disk",
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			go func() { _ = server.ServeConn(ctx, theirs) }()
			return ours, nil
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = client.Close() }()

	p := make([]byte, 5)
	_, err = client.ReadAt(p, 0)
	fmt.Printf("%d bytes, read-only %v: %s, %v\n", client.Size(), client.Flags().Has(nbd.FlagReadOnly), p, err)
	// Output: 15 bytes, read-only true: bytes, <nil>
}

// ExampleClient_BlockStatus copies what changed according to a dirty bitmap.
func ExampleClient_BlockStatus() {
	changed := func(ctx context.Context, url string) error {
		cfg, err := nbd.ParseURL(url)
		if err != nil {
			return err
		}
		const bitmap = "qemu:dirty-bitmap:backup-vda"
		cfg.RequiredContexts = []string{bitmap} // not granted: an error, never "nothing changed"
		client, err := nbd.Dial(ctx, cfg)
		if err != nil {
			return err
		}
		defer func() { _ = client.Close() }()
		for e, err := range client.BlockStatus(ctx, bitmap, 0, client.Size()) {
			if err != nil {
				return err
			}
			if e.Flags&nbd.StateDirty != 0 {
				fmt.Println("changed:", e.Offset, e.Length)
			}
		}
		return nil
	}
	fmt.Println(changed(context.Background(), "nbd+unix:///vda?sock=/run/backup.sock"))
	// Output: nbd: URL: parameter socket is required
}
