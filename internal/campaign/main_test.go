package campaign_test

import (
	"os"
	"runtime/debug"
	"testing"
)

// TestMain lets worlds, of which thousands are made and thrown away, be collected
// more rarely.
func TestMain(m *testing.M) {
	debug.SetGCPercent(400)
	os.Exit(m.Run())
}
