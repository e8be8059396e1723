//! The machine under adversarial orders ([`world`], a driver that checks everything), and single cases.

mod cases;
mod world;

use world::explore;

/// Schedules of [`explore`]: about ten seconds in a build with few optimisations.
const SCHEDULES: u64 = 100_000;

#[test]
fn random_and_adversarial_schedules() {
    let mut total = world::Seen::default();
    for seed in 0..SCHEDULES {
        total.add(&explore(seed));
    }
    // The world must have seen what it is about.
    println!("{total:?} in {SCHEDULES} schedules");
    let [hits, fast, drafted, timeouts, lost, stale, reused, used_short] = total.counts();
    for (what, count) in [
        ("hits", hits),
        ("fast rounds", fast),
        ("drafted chains", drafted),
        ("timeouts", timeouts),
        ("lost workers", lost),
        ("stale events", stale),
        ("ids used again", reused),
        ("short entries used", used_short),
    ] {
        assert!(count * 50 > SCHEDULES, "{what}: only {count} in {SCHEDULES} schedules");
    }
}
