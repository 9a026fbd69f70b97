package connect

import (
	"fmt"
	"io"
	"log/slog"
)

// Secret is a password. It does not print, whatever the verb.
type Secret string

// String hides the secret.
func (Secret) String() string { return "[secret]" }

// GoString hides the secret.
func (Secret) GoString() string { return "[secret]" }

// Format hides the secret from every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[secret]") }

// LogValue hides the secret in logs.
func (Secret) LogValue() slog.Value { return slog.StringValue("[secret]") }

// MarshalText hides the secret in documents.
func (Secret) MarshalText() ([]byte, error) { return []byte("[secret]"), nil }
