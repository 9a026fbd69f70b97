// Package secret holds passwords and keys so that they cannot be printed, logged,
// encoded or compared by accident. Reveal is the one way to the clear text.
package secret

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// redacted stands for any secret, also for an empty one: whether there is one is
// nobody's business either.
const redacted = "[secret]"

// Secret is a password or a key. The zero value is the empty secret. It is a
// value, may be copied, and is safe for concurrent use. It does not compare with
// ==; see Equal. What holds a Secret, even in an unexported field, may be printed
// with any verb, logged, encoded as JSON or text, or dumped by reflection: the
// clear text is in a closure, where none of these look. Package gob refuses it.
type Secret struct {
	reveal func() string
}

// New returns the secret with this clear text.
func New(clear string) Secret {
	if clear == "" {
		return Secret{}
	}
	return Secret{reveal: func() string { return clear }}
}

// Reveal returns the clear text. Call it where the secret is used, and nowhere
// else: what it returns protects itself no longer.
func (s Secret) Reveal() string {
	if s.reveal == nil {
		return ""
	}
	return s.reveal()
}

// Empty reports whether the secret has no characters.
func (s Secret) Empty() bool { return s.reveal == nil }

// IsZero reports the same as Empty, for the JSON option omitzero.
func (s Secret) IsZero() bool { return s.reveal == nil }

// Equal compares in a time that depends on the lengths alone.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// String hides the secret.
func (Secret) String() string { return redacted }

// GoString hides the secret.
func (Secret) GoString() string { return redacted }

// Format hides the secret from every verb of package fmt.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue hides the secret from package log/slog.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText hides the secret from encoders.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON hides the secret from JSON.
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// ErrEncode says that a secret was to be written for a machine that would read it
// back. Unlike logs and JSON, such a form has no reader who knows what the
// redacted text means.
var ErrEncode = errors.New("a secret cannot be encoded")

// MarshalBinary fails with ErrEncode: package gob and its like refuse a secret,
// and whatever holds one in a field that they would encode.
func (Secret) MarshalBinary() ([]byte, error) { return nil, ErrEncode }

// ErrDecode says that a secret was to be read from a document. Documents hold no
// secrets, and what Marshal wrote in its place must not become a password.
var ErrDecode = errors.New("a secret cannot be read from a document")

// UnmarshalText fails with ErrDecode.
func (*Secret) UnmarshalText([]byte) error { return ErrDecode }

// UnmarshalJSON fails with ErrDecode.
func (*Secret) UnmarshalJSON([]byte) error { return ErrDecode }

// UnmarshalBinary fails with ErrDecode.
func (*Secret) UnmarshalBinary([]byte) error { return ErrDecode }
