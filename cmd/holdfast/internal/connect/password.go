package connect

import "github.com/holdfast-backup/holdfast/repository/kopiarepo"

// PasswordReport tells what a change of a repository's password did.
type PasswordReport = kopiarepo.PasswordReport
