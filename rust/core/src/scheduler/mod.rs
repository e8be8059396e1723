//! Who runs when. Nothing here reads a clock, sleeps or spawns.
//!
//! * [`confidence`]: how sure a model was along a trace: token, group and trace confidences, at once and step by step.

pub mod confidence;
