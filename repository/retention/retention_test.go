package retention_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"
	_ "time/tzdata" // zones on any machine

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/repository"
	"github.com/holdfast-backup/holdfast/repository/retention"
)

// at makes committed points of one chain, sequence numbers in the order given.
func at(t *testing.T, loc *time.Location, times ...string) (out []*repository.Point) {
	t.Helper()
	for i, s := range times {
		created, err := time.ParseInLocation("2006-01-02 15:04", s, loc)
		require.NoError(t, err)
		out = append(out, &repository.Point{
			ID: repository.PointID(s), Chain: "vm", Sequence: int64(i + 1), Created: created, State: repository.Committed,
		})
	}
	return out
}

func now(t *testing.T, loc *time.Location) time.Time {
	t.Helper()
	n, err := time.ParseInLocation("2006-01-02 15:04", "2026-12-31 23:59", loc)
	require.NoError(t, err)
	return n
}

// keeps returns the reasons of kept points by ID.
func keeps(t *testing.T, points []*repository.Point, p retention.Policy, n time.Time) map[string][]retention.Reason {
	t.Helper()
	plan, err := retention.Plan(points, p, n)
	require.NoError(t, err)
	require.Len(t, plan, len(points))
	out := map[string][]retention.Reason{}
	for i, d := range plan {
		require.Same(t, points[i], d.Point, "the order is that of the points")
		require.Equal(t, len(d.Reasons) > 0, d.Keep)
		if d.Keep {
			out[string(d.Point.ID)] = d.Reasons
		}
	}
	return out
}

func TestNewestOfEachPeriodIsKept(t *testing.T) {
	points := at(t, time.UTC,
		"2025-12-28 10:00", "2025-12-29 10:00", "2026-01-01 01:00", "2026-01-01 23:00",
		"2026-01-04 12:00", "2026-01-05 12:00", "2026-02-03 12:10", "2026-02-03 12:50", "2026-02-03 13:00",
	)
	for _, c := range []struct {
		policy retention.Policy
		reason retention.Reason
		want   []string
	}{
		{retention.Policy{Last: 2}, retention.Last, []string{"2026-02-03 13:00", "2026-02-03 12:50"}},
		{retention.Policy{Hourly: 3}, retention.Hourly, []string{"2026-02-03 13:00", "2026-02-03 12:50", "2026-01-05 12:00"}},
		{retention.Policy{Daily: 4}, retention.Daily, []string{"2026-02-03 13:00", "2026-01-05 12:00", "2026-01-04 12:00", "2026-01-01 23:00"}},
		// 29 December 2025 to 4 January 2026 is one ISO week of 2026.
		{retention.Policy{Weekly: 9}, retention.Weekly, []string{"2026-02-03 13:00", "2026-01-05 12:00", "2026-01-04 12:00", "2025-12-28 10:00"}},
		{retention.Policy{Monthly: 2}, retention.Monthly, []string{"2026-02-03 13:00", "2026-01-05 12:00"}},
		{retention.Policy{Yearly: 5}, retention.Yearly, []string{"2026-02-03 13:00", "2025-12-29 10:00"}},
	} {
		want := map[string][]retention.Reason{}
		for i, id := range c.want {
			want[id] = []retention.Reason{c.reason}
			if i == 0 {
				want[id] = append(want[id], retention.Newest)
			}
		}
		require.Equal(t, want, keeps(t, points, c.policy, now(t, time.UTC)), "%+v", c.policy)
	}
}

func TestRulesAddUp(t *testing.T) {
	points := at(t, time.UTC, "2026-03-01 10:00", "2026-04-01 10:00", "2026-04-02 10:00", "2026-04-02 11:00")
	got := keeps(t, points, retention.Policy{Last: 1, Daily: 2, Monthly: 2}, now(t, time.UTC))
	require.Equal(t, map[string][]retention.Reason{
		"2026-04-02 11:00": {retention.Last, retention.Daily, retention.Monthly, retention.Newest},
		"2026-04-01 10:00": {retention.Daily},
		"2026-03-01 10:00": {retention.Monthly},
	}, got)
}

func TestPeriodsOfOneNameInTwoYears(t *testing.T) {
	points := at(t, time.UTC, "2025-02-05 10:00", "2026-02-04 10:00") // both in week 6, nothing between
	require.Len(t, keeps(t, points, retention.Policy{Weekly: 2}, now(t, time.UTC)), 2)
	require.Len(t, keeps(t, points, retention.Policy{Monthly: 2}, now(t, time.UTC)), 2)
	points = at(t, time.UTC, "2025-02-04 10:00", "2026-02-04 10:00")
	require.Len(t, keeps(t, points, retention.Policy{Daily: 2}, now(t, time.UTC)), 2)
	require.Len(t, keeps(t, points, retention.Policy{Hourly: 2}, now(t, time.UTC)), 2)
}

func TestUnusablePolicies(t *testing.T) {
	for _, p := range []retention.Policy{{}, {Last: -1}, {Last: 3, Daily: -1}} {
		plan, err := retention.Plan(nil, p, now(t, time.UTC))
		require.ErrorIs(t, err, retention.ErrPolicy, "%+v", p)
		require.Nil(t, plan)
	}
	require.NoError(t, retention.Policy{Yearly: 1}.Validate())
}

func TestChainsAreIndependent(t *testing.T) {
	points := at(t, time.UTC, "2026-01-01 10:00", "2026-01-02 10:00", "2026-01-03 10:00", "2026-01-04 10:00")
	points[0].Chain, points[1].Chain = "a", "b" // old, alone in their chains
	require.Len(t, keeps(t, points, retention.Policy{Last: 1}, now(t, time.UTC)), 3)
}

// TestLastGoodPointSurvives holds what a policy must not do even if it is told to.
func TestLastGoodPointSurvives(t *testing.T) {
	points := at(t, time.UTC, "2026-01-01 10:00", "2026-01-02 10:00", "2026-01-03 10:00", "2027-06-01 10:00")
	points[1].State, points[2].State = repository.Untrusted, repository.Vanished
	got := keeps(t, points, retention.Policy{Last: 1}, now(t, time.UTC))
	require.Equal(t, map[string][]retention.Reason{
		"2026-01-01 10:00": {retention.Last, retention.Newest},
		"2026-01-02 10:00": {retention.Untouched},
		"2026-01-03 10:00": {retention.Untouched},
		"2027-06-01 10:00": {retention.Future},
	}, got, "neither damaged points nor one from the future push out the good one")
}

func TestEqualTimesGoBySequence(t *testing.T) {
	points := at(t, time.UTC, "2026-01-01 10:00", "2026-01-01 10:00", "2026-01-01 10:00")
	for i := range points {
		points[i].ID = repository.PointID(strconv.Itoa(i))
	}
	slices.Reverse(points)
	require.Equal(t, map[string][]retention.Reason{"2": {retention.Daily, retention.Newest}},
		keeps(t, points, retention.Policy{Daily: 3}, now(t, time.UTC)))
}

func TestTimeZoneDecidesTheDay(t *testing.T) {
	points := at(t, time.UTC, "2026-05-01 20:00", "2026-05-01 23:00", "2026-05-02 03:00")
	tokyo, err := time.LoadLocation("Asia/Tokyo") // nine hours on: all on 2 May
	require.NoError(t, err)
	require.Len(t, keeps(t, points, retention.Policy{Daily: 5}, now(t, time.UTC)), 2)
	require.Len(t, keeps(t, points, retention.Policy{Daily: 5}, now(t, tokyo)), 1)
}

func TestClockSetBackHasTwoHoursOfOneName(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	require.NoError(t, err)
	first := time.Date(2026, 10, 25, 0, 30, 0, 0, time.UTC) // 02:30 summer time
	var points []*repository.Point
	for i := range 3 { // 02:30, 02:30 again, 03:30
		points = append(points, &repository.Point{
			ID: repository.PointID(strconv.Itoa(i)), Chain: "vm", Sequence: int64(i), State: repository.Committed,
			Created: first.Add(time.Duration(i) * time.Hour),
		})
	}
	require.Equal(t, "02", points[1].Created.In(berlin).Format("15"))
	require.Len(t, keeps(t, points, retention.Policy{Hourly: 9}, now(t, berlin)), 3)
	require.Len(t, keeps(t, points, retention.Policy{Daily: 9}, now(t, berlin)), 1)
}

// oracle decides the slow way: point by point, looking at all others.
func oracle(points []*repository.Point, p retention.Policy, n time.Time) []bool {
	type mark struct{ keys [6]string }
	counts := func(x *repository.Point) bool { return x.State == repository.Committed && !x.Created.After(n) }
	marks := make([]mark, len(points))
	for i, x := range points {
		local := x.Created.In(n.Location())
		monday := time.Date(local.Year(), local.Month(), local.Day()-(int(local.Weekday())+6)%7, 12, 0, 0, 0, time.UTC)
		marks[i].keys = [6]string{
			fmt.Sprint(i), local.Format("2006-01-02 15 -07:00:00"), local.Format("2006-01-02"),
			monday.Format("2006-01-02"), local.Format("2006-01"), local.Format("2006"),
		}
	}
	newer := func(a, b *repository.Point) bool {
		return a.Created.After(b.Created) || a.Created.Equal(b.Created) && a.Sequence > b.Sequence
	}
	keep := make([]bool, len(points))
	for i, x := range points {
		if !counts(x) {
			keep[i] = true
			continue
		}
		var rivals []int // newer ones of the chain
		for j, y := range points {
			if y.Chain == x.Chain && counts(y) && newer(y, x) {
				rivals = append(rivals, j)
			}
		}
		keep[i] = len(rivals) == 0
		for r, limit := range []int{p.Last, p.Hourly, p.Daily, p.Weekly, p.Monthly, p.Yearly} {
			periods := map[string]bool{}
			for _, j := range rivals {
				periods[marks[j].keys[r]] = true
			}
			keep[i] = keep[i] || !periods[marks[i].keys[r]] && len(periods) < limit
		}
	}
	return keep
}

func TestPlanAgreesWithAnOracle(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		seed = n
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 4))
	var zones []*time.Location
	for _, z := range []string{
		"UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu", "Pacific/Apia", "America/Los_Angeles",
	} {
		loc, err := time.LoadLocation(z)
		require.NoError(t, err)
		zones = append(zones, loc)
	}
	steps := []time.Duration{10 * time.Minute, time.Hour, 7 * time.Hour, 24 * time.Hour, 100 * time.Hour, 40 * 24 * time.Hour}
	for round := range 10_000 {
		// Calendars lie around changes of the clock and of the year more often than not.
		start := []time.Time{
			time.Date(2026, 3, 28, 0, 0, 0, 0, time.UTC), time.Date(2026, 10, 24, 0, 0, 0, 0, time.UTC),
			time.Date(2026, 12, 28, 0, 0, 0, 0, time.UTC), time.Date(2011, 12, 28, 0, 0, 0, 0, time.UTC), // Apia skipped the 30th
			time.Date(2020+rng.IntN(10), 1, rng.IntN(365), 0, 0, 0, 0, time.UTC),
		}[rng.IntN(5)].Add(time.Duration(rng.IntN(72)) * time.Hour)
		step := steps[rng.IntN(len(steps))]
		var points []*repository.Point
		created := start
		for i := range rng.IntN(25) {
			if rng.IntN(8) > 0 {
				created = created.Add(time.Duration(rng.Int64N(int64(2 * step))).Truncate(time.Minute))
			}
			state := repository.Committed
			if rng.IntN(12) == 0 {
				state = repository.Untrusted
			}
			points = append(points, &repository.Point{
				ID: repository.PointID(strconv.Itoa(i)), Chain: fmt.Sprint("vm-", rng.IntN(2)), Sequence: int64(i), Created: created, State: state,
			})
		}
		n := created.In(zones[rng.IntN(len(zones))])
		if rng.IntN(10) == 0 {
			n = n.Add(-3 * step)
		}
		rng.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
		var p retention.Policy
		for p.Validate() != nil {
			for _, f := range []*int{&p.Last, &p.Hourly, &p.Daily, &p.Weekly, &p.Monthly, &p.Yearly} {
				*f = max(0, rng.IntN(9)-4)
			}
		}
		want := oracle(points, p, n)
		plan, err := retention.Plan(points, p, n)
		require.NoError(t, err)
		for i, d := range plan {
			if d.Keep != want[i] {
				t.Fatalf("HOLDFAST_SEED=%d round %d: %+v at %s: point %s (%s, %s): keep %t, want %t",
					seed, round, p, n, d.Point.ID, d.Point.Chain, d.Point.Created, d.Keep, want[i])
			}
		}
	}
}

func ExamplePlan() {
	day := func(d int) *repository.Point {
		return &repository.Point{
			ID: repository.PointID(fmt.Sprint("p", d)), Chain: "web1", Sequence: int64(d),
			Created: time.Date(2026, 6, d, 3, 0, 0, 0, time.UTC), State: repository.Committed,
		}
	}
	plan, err := retention.Plan(
		[]*repository.Point{day(6), day(7), day(8), day(9), day(10)},
		retention.Policy{Last: 1, Weekly: 2},
		time.Date(2026, 6, 10, 12, 0, 0, 0, time.UTC),
	)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, d := range plan {
		fmt.Println(d.Point.ID, d.Keep, d.Reasons)
	}
	// Output:
	// p6 false []
	// p7 true [weekly]
	// p8 false []
	// p9 false []
	// p10 true [last weekly newest]
}
