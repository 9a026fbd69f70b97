package kopiarepo

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/crypto/argon2"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/secret"
)

// keySlot is a master key wrapped by a password. Damage is told from a wrong
// password by Sum.
type keySlot struct {
	Type      string `json:"holdfast"` // "key slot"
	Version   int    `json:"v"`
	Repo      string `json:"repo"`
	KDF       string `json:"kdf"` // "argon2id"
	MemoryKiB uint32 `json:"memory_kib"`
	Time      uint32 `json:"time"`
	Threads   uint8  `json:"threads"`
	Salt      []byte `json:"salt"`
	Wrapped   []byte `json:"wrapped"` // nonce and AES-256-GCM of the master key
	Sum       []byte `json:"sum"`     // SHA-256 of the slot without Sum
}

// slotNames are the copies of the key slot.
var slotNames = [...]string{"holdfast/keys/slot-1.a", "holdfast/keys/slot-1.b", "holdfast-2/keys/slot-1.c"}

const (
	maxSlot      = 64 << 10
	maxKDFMemory = 4 << 20 // KiB
	maxKDFTime   = 64
)

func (s *keySlot) sum() []byte {
	c := *s
	c.Sum = nil
	b, _ := json.Marshal(&c) // cannot fail
	h := sha256.Sum256(b)
	return h[:]
}

func (s *keySlot) aead(password secret.Secret) (cipher.AEAD, error) {
	if s.KDF != "argon2id" {
		return nil, fmt.Errorf("%w: key slot uses unknown key derivation %q", repository.ErrDamaged, s.KDF)
	}
	if s.MemoryKiB > maxKDFMemory || s.Time < 1 || s.Time > maxKDFTime || s.Threads < 1 || len(s.Salt) < 16 {
		return nil, fmt.Errorf("%w: key slot has parameters out of bounds", repository.ErrDamaged)
	}
	return newGCM(argon2.IDKey([]byte(password.Reveal()), s.Salt, s.Time, s.MemoryKiB, s.Threads, 32))
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func (s *keySlot) aad() []byte { return []byte("holdfast v1 master key of " + s.Repo) }

// newSlot wraps master.
func newSlot(repo string, master []byte, password secret.Secret, kdf KDF, rnd io.Reader) ([]byte, error) {
	kdf = kdf.orDefault()
	s := &keySlot{
		Type: "key slot", Version: 1, Repo: repo, KDF: "argon2id",
		MemoryKiB: kdf.MemoryKiB, Time: kdf.Time, Threads: kdf.Threads, Salt: make([]byte, 32),
	}
	if _, err := io.ReadFull(rnd, s.Salt); err != nil {
		return nil, err
	}
	gcm, err := s.aead(password)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, gcm.NonceSize())
	if _, err := io.ReadFull(rnd, nonce); err != nil {
		return nil, err
	}
	s.Wrapped = gcm.Seal(nonce, nonce, master, s.aad())
	s.Sum = s.sum()
	b, err := json.MarshalIndent(s, "", " ")
	return append(b, '\n'), err
}

// parseSlot returns nil if the bytes are not an undamaged slot.
func parseSlot(b []byte) *keySlot {
	var s keySlot
	if json.Unmarshal(b, &s) != nil || s.Type != "key slot" || s.Version != 1 || !bytes.Equal(s.Sum, s.sum()) {
		return nil
	}
	return &s
}

// openSlots unwraps the master key with the first good copy of the key slot. It
// returns the slot's bytes as they should be in each copy.
func openSlots(ctx context.Context, dir *dirStore, password secret.Secret) (repo string, master, slot []byte, err error) {
	var problems []error
	tried := map[string]bool{}
	wrong := false
	for _, name := range slotNames {
		b, err := dir.get(ctx, name, maxSlot)
		if err != nil {
			if ctx.Err() != nil {
				return "", nil, nil, err
			}
			problems = append(problems, err)
			continue
		}
		s := parseSlot(b)
		if s == nil {
			problems = append(problems, fmt.Errorf("%w: key slot %s", repository.ErrDamaged, name))
			continue
		}
		if tried[string(b)] {
			continue
		}
		tried[string(b)] = true
		gcm, err := s.aead(password)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if len(s.Wrapped) <= gcm.NonceSize() {
			problems = append(problems, fmt.Errorf("%w: key slot %s is too short", repository.ErrDamaged, name))
			continue
		}
		master, err := gcm.Open(nil, s.Wrapped[:gcm.NonceSize()], s.Wrapped[gcm.NonceSize():], s.aad())
		if err != nil {
			wrong = true
			continue
		}
		return s.Repo, master, b, nil
	}
	if wrong {
		return "", nil, nil, repository.ErrPassword
	}
	if err := errors.Join(problems...); !errors.Is(err, repository.ErrDamaged) && errors.Is(err, fs.ErrNotExist) {
		return "", nil, nil, fmt.Errorf("%w: no key slot is left: %w", repository.ErrDamaged, err)
	}
	return "", nil, nil, errors.Join(problems...)
}

// keys are derived from the master key.
type keys struct {
	master []byte
	seal   cipher.AEAD
	sign   ed25519.PrivateKey
}

func newKeys(master []byte) (*keys, error) {
	if len(master) != 32 {
		return nil, fmt.Errorf("%w: master key has %d bytes", repository.ErrDamaged, len(master))
	}
	k := &keys{master: master}
	var err error
	if k.seal, err = newGCM(k.derive("seal")); err != nil {
		return nil, err
	}
	k.sign = ed25519.NewKeyFromSeed(k.derive("sign"))
	return k, nil
}

// derive returns a 32-byte key for one purpose.
func (k *keys) derive(purpose string) []byte {
	b, err := hkdf.Key(sha256.New, k.master, nil, "holdfast v1 "+purpose, 32)
	if err != nil {
		panic(fmt.Sprintf("HKDF refused 32 bytes: %v", err)) // cannot happen
	}
	return b
}

func (k *keys) public() ed25519.PublicKey { return k.sign.Public().(ed25519.PublicKey) }
