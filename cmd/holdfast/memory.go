package main

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// softMemory is what the command is content with, in bytes: with it, eight disks at
// once and a sparse disk of 8 TiB stay below 256 MiB (docs/performance.md).
const softMemory = 180 << 20

// tameMemory makes the garbage collector keep to softMemory, or to half as much
// again as is in use where a large repository needs more. GOMEMLIMIT overrules it.
func tameMemory() {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	debug.SetMemoryLimit(softMemory)
	go func() { // for the life of the process
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		for range time.Tick(time.Second) {
			metrics.Read(live)
			if v := live[0].Value; v.Kind() == metrics.KindUint64 {
				debug.SetMemoryLimit(max(softMemory, int64(v.Uint64())*3/2))
			}
		}
	}()
}
