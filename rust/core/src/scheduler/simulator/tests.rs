//! The simulator against what can be computed.

use super::process::{Coins, Places, Process};
use super::toy::Toy;
use super::*;
use crate::scheduler::Fallback;

fn config(fallback: Fallback, acceptance: f64, hit: f64) -> Config {
    Config {
        settings: Settings {
            draft_length: 5,
            budget: 30,
            depth: 5,
            fallback,
            max_batch: 8,
            patience: None,
            adaptive: false,
            ordered: false,
            guess_first: false,
            together: false,
            workers: 1,
            vocabulary: 1000,
            seed: 1,
        },
        targets: 1,
        drafts: 1,
        streams: 1,
        tokens: 60_000,
        times: Times { target: [1.0, 0.0, 0.0], draft: [0.138, 0.0], glue: 0.0, link: [0.0; 2] },
        process: Process::Coins(Coins { acceptance: [Places(vec![acceptance]), Places(vec![0.0])], hit: [hit; 2] }),
        whole_only: false,
        log: true,
    }
}

fn tokens(acceptance: f64, length: i32) -> f64 {
    (1.0 - acceptance.powi(length + 1)) / (1.0 - acceptance)
}

#[test]
fn p12_theorem_7() {
    for hit in [0.0, 0.5, 0.9, 1.0] {
        let found = simulate(&config(Fallback::Neural, 0.8, hit), || false).unwrap();
        let expected = tokens(0.8, 5) / (hit + (1.0 - hit) * (1.0 + 5.0 * 0.138));
        let rate = found.tokens as f64 / found.elapsed;
        assert!((rate / expected - 1.0).abs() < 0.01, "p {hit}: {rate} for {expected}");
    }
}

#[test]
fn p14_nobody_waits_for_a_hit_and_every_wait_is_accounted_for() {
    let found = simulate(&config(Fallback::Neural, 0.8, 0.7), || false).unwrap();
    let mut waits = 0.0;
    for logged in &found.log {
        let [free, began, _] = logged.times;
        let ready = logged.rows.iter().map(|row| row.ready).fold(free, f64::max);
        assert!((began - ready).abs() < 1e-9, "{logged:?}");
        if logged.rows.iter().all(|row| row.source == 0) {
            assert_eq!(began, free);
        }
        waits += began - free;
    }
    let counted: f64 = found.stats[0].waits.iter().sum();
    assert!((waits - counted).abs() < 2.0, "{waits} {counted}"); // the first chain is no wait of a verification
}

#[test]
fn the_same_seed_gives_the_same_run_and_toy_text_is_whole() {
    let toy = Toy::random(3, 4, 1.0, 0.5, 1.0, 1.0, 2);
    let mut config = config(Fallback::Adaptive, 0.8, 0.7);
    config.process = Process::Toy(toy);
    config.settings.vocabulary = 4;
    config.settings.budget = 8;
    config.settings.adaptive = true;
    config.tokens = 5000;
    let (one, two) = (simulate(&config, || false).unwrap(), simulate(&config, || false).unwrap());
    assert_eq!(one, two);
    assert_eq!(one.text.len() as u64, one.stats[0].tokens);
    assert!(one.stats[0].hits.iter().sum::<u64>() > 100);
}

#[test]
fn clusters_share_devices() {
    for (targets, drafts) in [(1, 3), (3, 1), (2, 2), (2, 0)] {
        let mut config = config(Fallback::Adaptive, 0.8, 0.7);
        (config.targets, config.drafts, config.streams, config.tokens) = (targets, drafts, 4, 5000);
        let found = simulate(&config, || false).unwrap();
        assert!(found.stats.iter().all(|stats| stats.tokens > 1000), "{targets} {drafts}");
        assert!(drafts > 0 || found.draft_busy == 0.0);
    }
    assert!(simulate(&config(Fallback::Fast, 0.5, 0.5), || true).is_err());
}
