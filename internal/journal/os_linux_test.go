package journal

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// asNobody runs f with the file permissions of a user who is not root.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Getuid() != 0 {
		f()
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_, err := unix.SetfsuidRetUid(65534)
	require.NoError(t, err)
	defer func() {
		_, err := unix.SetfsuidRetUid(0)
		require.NoError(t, err)
	}()
	f()
}

// open makes a directory that everybody can use, and those above it too.
func open(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != filepath.Clean(os.TempDir()) && d != "/"; d = filepath.Dir(d) {
		require.NoError(t, os.Chmod(d, 0o777))
	}
	return dir
}

// TestSystemRefuses: what the operating system refuses is an error of the operation.
func TestSystemRefuses(t *testing.T) {
	fsys := OS()
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.ErrorIs(t, fsys.MkdirAll(filepath.Join(file, "x")), unix.ENOTDIR)
	require.ErrorIs(t, fsys.MkdirAll(file), unix.ENOTDIR)
	require.ErrorIs(t, fsys.SyncDir("/proc"), unix.EINVAL)
	require.ErrorIs(t, fsys.SyncDir(file+"none"), os.ErrNotExist)
	_, err := fsys.Lock(filepath.Join(file, "lock"))
	require.ErrorIs(t, err, unix.ENOTDIR)
	f, err := fsys.Open(file)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	_, err = f.Size()
	require.ErrorIs(t, err, os.ErrClosed)
	_, err = f.TryLock()
	require.Error(t, err)

	blind := filepath.Join(open(t), "blind")
	require.NoError(t, os.Mkdir(blind, 0o777))
	require.NoError(t, os.Chmod(blind, 0o333)) // names can be made, and not be listed
	list := filepath.Join(open(t), "list")
	require.NoError(t, os.Mkdir(list, 0o777))
	require.NoError(t, os.WriteFile(filepath.Join(list, "x"), nil, 0o600))
	require.NoError(t, os.Chmod(list, 0o444)) // names can be listed, and not be used
	closed := filepath.Join(open(t), "closed")
	require.NoError(t, os.Mkdir(closed, 0o700))
	t.Cleanup(func() { require.NoError(t, os.Chmod(list, 0o700)); require.NoError(t, os.Chmod(blind, 0o700)) })
	asNobody(t, func() {
		require.ErrorIs(t, fsys.MkdirAll(filepath.Join(blind, "a", "b")), os.ErrPermission, "the name of the new directory is not durable")
		_, err = fsys.ReadDir(list)
		require.ErrorIs(t, err, os.ErrPermission)
		_, err = fsys.ReadDir(blind)
		require.ErrorIs(t, err, os.ErrPermission)
	})
	if os.Getuid() == 0 { // else it is ours
		asNobody(t, func() {
			_, err := List(closed, nil)
			require.ErrorIs(t, err, os.ErrPermission)
		})
	}
}

// TestLostWorkingDirectory: a relative name means nothing in a directory that is gone.
func TestLostWorkingDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	require.NoError(t, os.Mkdir(dir, 0o700))
	t.Chdir(dir)
	require.NoError(t, os.Remove(dir))
	require.ErrorContains(t, OS().MkdirAll("x"), "getwd")
}

// TestNothingStaysOpen counts the descriptors of the process.
func TestNothingStaysOpen(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(fds)
	}
	dir := t.TempDir()
	before := count()
	for range 40 {
		require.NoError(t, OS().MkdirAll(filepath.Join(dir, "a", "b")))
		require.NoError(t, OS().SyncDir(dir))
		require.Error(t, OS().SyncDir("/proc"))
		unlock, err := OS().Lock(filepath.Join(dir, "lock"))
		require.NoError(t, err)
		require.NoError(t, unlock())
	}
	require.Less(t, count(), before+20)
}
