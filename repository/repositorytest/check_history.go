package repositorytest

import (
	"fmt"
	"maps"
	"slices"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
)

func historyChecks() []Check {
	return []Check{
		{"HistoryOfGenerations", checkHistory},
		{"HistoryAcrossProcesses", checkHistoryReopen},
	}
}

// checkHistory is the keystone: random disks over several generations, with
// deletions and maintenance in between; every point reads back its own truth.
func checkHistory(t T, h *Harness) { history(newEnv(t, h), 14, false) }

func checkHistoryReopen(t T, h *Harness) { history(newEnv(t, h), 8, true) }

// kept is a committed point and its truth.
type kept struct {
	id    repository.PointID
	chain string
	disks map[string]*disk
}

func history(e *env, steps int, reopen bool) {
	var live []*kept
	for step := range steps {
		if reopen {
			e.repo = e.reopen()
		}
		switch roll := e.rng.IntN(10); {
		case roll < 7 || len(live) < 2:
			live = append(live, e.generation(live, step))
		case roll == 7:
			i := e.rng.IntN(len(live))
			e.deletePoint(live[i].id)
			live = slices.Delete(live, i, i+1)
		case roll == 8:
			e.collect()
		default:
			plan := one(e.random(3*small, small, 1))
			w, err := e.write(e.repo, plan)
			require.NoError(e, err)
			require.NoError(e, w.Abort(e.ctx))
		}
	}
	e.collect()
	require.ElementsMatch(e, idsOf(live), ids(e.list(e.repo, repository.Query{})))
	for _, k := range live {
		e.expect(e.repo, k.id, k.disks)
	}
	rep, err := e.repo.Verify(e.ctx, &repository.VerifyOptions{Level: repository.VerifyData})
	require.NoError(e, err)
	require.Empty(e, rep.Damages)
}

func idsOf(live []*kept) []repository.PointID {
	out := []repository.PointID{}
	for _, k := range live {
		out = append(out, k.id)
	}
	return out
}

// generation commits a point: of a new chain, or the next of some live point; the
// guest writes, discards, grows disks, adds and removes some in between.
func (e *env) generation(live []*kept, step int) *kept {
	e.Helper()
	k := &kept{chain: fmt.Sprint("vm-", e.rng.IntN(2)), disks: map[string]*disk{}}
	plan := &pointPlan{disks: map[string]diskPlan{}}
	var parents []*kept
	for _, l := range live {
		if l.chain == k.chain {
			parents = append(parents, l)
		}
	}
	if len(parents) > 0 && e.rng.IntN(5) > 0 {
		parent := parents[len(parents)-1]
		if e.rng.IntN(4) == 0 {
			parent = parents[e.rng.IntN(len(parents))]
		}
		plan.Parent = parent.id
		for _, id := range slices.Sorted(maps.Keys(parent.disks)) {
			e.evolve(plan, id, parent.disks[id])
		}
	}
	if len(plan.disks) == 0 || e.rng.IntN(4) == 0 {
		bs := []int{small, normal}[e.rng.IntN(2)]
		size := 1 + e.rng.Int64N(24*small)
		plan.disks[fmt.Sprint("new-", step)] = diskPlan{truth: e.random(size, bs, e.rng.Float64())}
	}
	plan.Chain = k.chain
	for id, d := range plan.disks {
		k.disks[id] = d.truth
	}
	k.id = e.commit(plan).ID
	return k
}

// evolve plans the next generation of a disk.
func (e *env) evolve(plan *pointPlan, id string, old *disk) {
	switch e.rng.IntN(10) {
	case 0: // removed
		return
	case 1: // grown: written in full
		next := old.clone()
		next.size += 1 + e.rng.Int64N(2*small)
		if last := old.count() - 1; old.blocks[last] != nil {
			next.fill(e.rng, last)
		}
		plan.disks[id] = diskPlan{truth: next}
		return
	case 2: // tracking was lost: everything is written, some of it unchanged
		next := old.clone()
		next.fill(e.rng, e.rng.Int64N(next.count()))
		var all []int64
		for i := range next.count() {
			all = append(all, i)
		}
		plan.disks[id] = diskPlan{truth: next, inherit: true, write: all}
		return
	}
	next := old.clone()
	write := map[int64]bool{}
	for range e.rng.IntN(8) {
		i := e.rng.Int64N(next.count())
		switch e.rng.IntN(4) {
		case 0:
			delete(next.blocks, i)
		case 1: // reported as changed, and is not
		default:
			next.fill(e.rng, i)
		}
		write[i] = true
	}
	plan.disks[id] = diskPlan{
		truth: next, inherit: true, write: slices.Sorted(maps.Keys(write)), advance: e.rng.IntN(2) == 0,
	}
}
