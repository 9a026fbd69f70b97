// Package kopiarepo is the production engine of the repository contract: kopia,
// embedded, for a directory on a local file system. Every call into kopia is in
// this package.
//
// Each restore point is a kopia snapshot, so that the stock kopia program lists,
// verifies and restores it with the same password. Around kopia the package adds
// what it lacks: restore-point records of our own, authenticated and chained, as
// the commit; an inventory of the digest of every stored blob; copies of what
// would stop the repository if it were lost; leases with fencing; and a check of
// everything that a point needs before it is called committed. docs/format.md has
// the layout.
package kopiarepo
