package connect

import "github.com/holdfast-backup/holdfast/secret"

// Secret is a password. It does not print, whatever the verb.
type Secret = secret.Secret

// NewSecret returns the secret with this clear text.
func NewSecret(clear string) Secret { return secret.New(clear) }
