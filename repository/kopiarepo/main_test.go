package kopiarepo_test

import (
	"os"
	"sync"
	"testing"
	_ "unsafe" // for go:linkname
)

func TestMain(m *testing.M) {
	rememberKeys()
	os.Exit(m.Run())
}

// kopia derives a key from the password whenever a repository is opened, which
// takes longer than all else that most tests do. keyDerivers is its table of ways to
// do so; a derivation there has the one method of deriver.
//
//go:linkname keyDerivers github.com/kopia/kopia/internal/crypto.keyDerivers
var keyDerivers map[string]deriver

type deriver interface {
	derive(password string, salt []byte, keySize int) ([]byte, error)
}

// rememberKeys makes a process derive the key of one password, salt and length once.
// It is the same key, derived by the same function.
func rememberKeys() {
	for name, d := range keyDerivers {
		keyDerivers[name] = &rememberer{inner: d, known: map[derivation][]byte{}}
		// The linker keeps the method because it is called here; kopia's call it does
		// not see.
		if _, err := keyDerivers[name].derive("", nil, 0); err == nil {
			panic("a key was derived without salt by " + name)
		}
	}
}

type derivation struct {
	password, salt string
	size           int
}

type rememberer struct {
	inner deriver

	mu    sync.Mutex
	known map[derivation][]byte
}

func (r *rememberer) derive(password string, salt []byte, keySize int) ([]byte, error) {
	k := derivation{password, string(salt), keySize}
	r.mu.Lock()
	defer r.mu.Unlock()
	if key, ok := r.known[k]; ok {
		return append([]byte(nil), key...), nil
	}
	key, err := r.inner.derive(password, salt, keySize)
	if err == nil {
		r.known[k] = append([]byte(nil), key...)
	}
	return key, err
}
