package kopiarepo

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast-backup/holdfast/repository"
)

// Every file of our own is two lines: one JSON envelope, and in hex either its
// HMAC-SHA256 or its Ed25519 signature.

// fileType separates the keys of the kinds of files, so that none can stand in
// for another.
type fileType string

const (
	typeFormat    fileType = "format"
	typeRecord    fileType = "record"
	typeAnchor    fileType = "anchor"
	typePacks     fileType = "packs"
	typeNote      fileType = "note"
	typeLock      fileType = "lock"
	typeInventory fileType = "inventory" // signed, so that it can be checked without a key
)

// private says whether bodies of this type are encrypted.
func (t fileType) private() bool {
	return t == typeRecord || t == typeNote || t == typePacks || t == typeAnchor
}

type envelope struct {
	Type    fileType        `json:"holdfast"`
	Version int             `json:"v"`
	Name    string          `json:"name"` // binds the file to its place
	Header  json.RawMessage `json:"header,omitempty"`
	Body    []byte          `json:"body,omitempty"`
}

// sum is the SHA-256 of a file.
type sum [sha256.Size]byte

func sumOf(b []byte) sum { return sha256.Sum256(b) }

func (s sum) String() string               { return hex.EncodeToString(s[:]) }
func (s sum) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
func (s sum) IsZero() bool                 { return s == sum{} }

func (s *sum) UnmarshalText(b []byte) error {
	if len(b) != 2*len(s) {
		return fmt.Errorf("a digest has %d hex digits, not %d", 2*len(s), len(b))
	}
	_, err := hex.Decode(s[:], b)
	return err
}

// write makes the bytes of a file. header may be nil.
func (k *keys) write(rnd io.Reader, t fileType, name string, header any, body []byte) ([]byte, error) {
	e := envelope{Type: t, Version: 1, Name: name, Body: body}
	if header != nil {
		h, err := json.Marshal(header)
		if err != nil {
			return nil, err
		}
		e.Header = h
	}
	if t.private() {
		nonce := make([]byte, k.seal.NonceSize(), k.seal.NonceSize()+len(body)+16)
		if _, err := io.ReadFull(rnd, nonce); err != nil {
			return nil, err
		}
		e.Body = k.seal.Seal(nonce, nonce, body, []byte(string(t)+"|"+name))
	}
	line, err := json.Marshal(&e)
	if err != nil {
		return nil, err
	}
	line = append(line, '\n')
	var auth []byte
	if t == typeInventory {
		auth = ed25519.Sign(k.sign, line)
	} else {
		auth = k.mac(t, line)
	}
	return append(hex.AppendEncode(line, auth), '\n'), nil
}

func (k *keys) mac(t fileType, line []byte) []byte {
	m := hmac.New(sha256.New, k.derive("mac of "+string(t)))
	m.Write(line)
	return m.Sum(nil)
}

// errForged matches repository.ErrDamaged too.
var errForged = fmt.Errorf("%w: the file is damaged or forged", repository.ErrDamaged)

// read checks a file and returns its header and its decrypted body.
func (k *keys) read(t fileType, name string, file []byte) (header json.RawMessage, body []byte, err error) {
	line, rest, ok := bytes.Cut(file, []byte("\n"))
	if !ok || len(rest) < 2 || rest[len(rest)-1] != '\n' {
		return nil, nil, errForged
	}
	line = file[:len(line)+1]
	// Upper-case digits are refused: exactly one form of a file is right.
	auth, err := hex.DecodeString(string(rest[:len(rest)-1]))
	if err != nil || hex.EncodeToString(auth) != string(rest[:len(rest)-1]) {
		return nil, nil, errForged
	}
	if t == typeInventory {
		ok = ed25519.Verify(k.public(), line, auth)
	} else {
		ok = hmac.Equal(auth, k.mac(t, line))
	}
	if !ok {
		return nil, nil, errForged
	}
	var e envelope
	if err := json.Unmarshal(line, &e); err != nil {
		return nil, nil, errors.Join(errForged, err)
	}
	if e.Type != t || e.Name != name || e.Version != 1 {
		return nil, nil, fmt.Errorf("%w: it is %s %q of version %d", errForged, e.Type, e.Name, e.Version)
	}
	body = e.Body
	if t.private() {
		n := k.seal.NonceSize()
		if len(body) < n {
			return nil, nil, errForged
		}
		if body, err = k.seal.Open(nil, body[:n], body[n:], []byte(string(t)+"|"+name)); err != nil {
			return nil, nil, errForged
		}
	}
	return e.Header, body, nil
}
