package secrettest_test

import (
	"bufio"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/secret/secrettest"
)

const clear = `Ti+ger/"&% lilies`

func TestEveryFormIsFound(t *testing.T) {
	c := secrettest.New("password", clear)
	j, err := json.Marshal(map[string]string{"p": clear})
	require.NoError(t, err)
	u := url.URL{Scheme: "x", User: url.UserPassword("u", clear), Host: "h", RawQuery: url.Values{"p": {clear}}.Encode()}
	planted := []string{
		"error: " + clear + "!", string(j), u.String(), url.PathEscape(clear), fmt.Sprintf("%q", clear), fmt.Sprint([]byte(clear)),
		hex.EncodeToString([]byte("a" + clear)), fmt.Sprintf("%X", clear), fmt.Sprintf("% x", clear),
	}
	for _, before := range []string{"", "a", "bc", "user:", "Basic"} {
		for _, after := range []string{"", "z", "yz"} {
			planted = append(planted, base64.StdEncoding.EncodeToString([]byte(before+clear+after)), base64.URLEncoding.EncodeToString([]byte(before+clear+after)))
		}
	}
	for _, p := range planted {
		require.Len(t, secrettest.Search("here", []byte(p), c), 1, p)
	}
	for name, form := range c.Forms() {
		require.GreaterOrEqual(t, len(form), 12, name)
	}
	for _, innocent := range []string{"", "[secret]", "Ti+ger", strings.Repeat("lilies", 1000)} {
		require.Empty(t, secrettest.Search("here", []byte(innocent), c))
	}
}

func TestTreesAreSearched(t *testing.T) {
	c, other := secrettest.New("one", clear), secrettest.New("two", "another canary")
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "a", "b"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a", "b", "clean"), []byte("nothing"), 0o600))
	found, err := secrettest.Tree(dir, c, other)
	require.NoError(t, err)
	require.Empty(t, found)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a", "b", "leak"), []byte("x "+clear), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a", "another canary"), nil, 0o600))
	found, err = secrettest.Tree(dir, c, other)
	require.NoError(t, err)
	require.Len(t, found, 2)
}

// TestProcessesAreSearched plants a secret in the arguments of a child, and in its
// environment.
func TestProcessesAreSearched(t *testing.T) {
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		t.Skip("linux: processes are looked at in /proc")
	}
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("sh is missing")
	}
	const canary = "canary-in-a-process"
	c := secrettest.New("password", canary)
	start := func(env string, args ...string) (stop func()) {
		cmd := exec.Command(sh, append([]string{"-c", "echo ready; read x"}, args...)...)
		cmd.Env = append(os.Environ(), env)
		in, err := cmd.StdinPipe()
		require.NoError(t, err)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		line, err := bufio.NewReader(out).ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "ready\n", line)
		return func() {
			_, _ = io.WriteString(in, "\n")
			require.NoError(t, cmd.Wait())
		}
	}
	for _, planted := range []struct {
		env  string
		args []string
		want int
	}{{"A=b", nil, 0}, {"A=" + canary, nil, 1}, {"A=b", []string{"--password", canary}, 1}} {
		stop := start(planted.env, planted.args...)
		found, seen := secrettest.Processes(os.Getpid(), c)
		stop()
		require.Len(t, found, planted.want, "%v", found)
		require.GreaterOrEqual(t, seen, 2)
	}
}
