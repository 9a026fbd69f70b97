// Command holdfast backs up, restores and verifies virtual machines.
package main

import (
	"context"
	"os"
)

func main() {
	tameMemory()
	p := system()
	os.Exit(p.run(context.Background(), os.Args[1:]))
}
