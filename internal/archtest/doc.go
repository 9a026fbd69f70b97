// Package archtest holds the rules of the code base that no compiler checks, as
// tests: who may depend on whom and why, and some manners of files.
//
// Run it with -count=1. The layer rules ask the go command, and what that reads is
// not an input that the test cache sees.
package archtest
