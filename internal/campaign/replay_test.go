package campaign_test

import (
	"os"
	"os/exec"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
)

// brokenStory is one that breaks the promise when a certain call fails: it takes a
// failed release for a success.
var brokenStory = os.Getenv("HOLDFAST_BROKEN_STORY") != ""

// TestReplay: the command that a violation prints makes the same violation, alone.
func TestReplay(t *testing.T) {
	s := &stories[1]
	x := shot{s, target{site{seamHypervisor, string(fakes.OpRelease), "vm-1"}, 1}, failBefore}
	seed := seedOf(t, s.name)
	line := x.replay(seed)
	words := regexp.MustCompile(`^HOLDFAST_FAULT='([^']*)' HOLDFAST_SEED=(\d+) go test -count=1 -v -run '([^']*)' \./internal/campaign$`).FindStringSubmatch(line)
	require.Len(t, words, 4, line)
	self, err := os.Executable()
	require.NoError(t, err)
	replay := func(env ...string) (string, error) {
		cmd := exec.Command(self, "-test.v", "-test.run", words[3])
		cmd.Env = append(os.Environ(), append(env, "HOLDFAST_FAULT="+words[1], "HOLDFAST_SEED="+words[2])...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	out, err := replay()
	require.NoError(t, err, "%s", out)
	out, err = replay("HOLDFAST_BROKEN_STORY=1")
	require.Error(t, err, "%s", out)
	require.Contains(t, out, "violation: I2")
	require.Contains(t, out, "replay with: "+line)
}
