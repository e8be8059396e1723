//! The speculation room's indices of a text.

use crate::door::to_python;
use pyo3::prelude::*;
use tilewise_core::error::Error;
use tilewise_core::speculation::drafts::{NGramIndex, SuffixIndex, TextIndex};

fn checked(py: Python<'_>, longest: usize, shortest: usize, most: usize) -> PyResult<()> {
    let wrong = |name: &str, allowed: String, got| Err(to_python(py, &Error::value(name, allowed, got)));
    if !(1..=most).contains(&longest) {
        return wrong("longest", format!("an integer in [1, {most}]"), longest);
    }
    if !(1..=longest).contains(&shortest) {
        return wrong("shortest", format!("an integer in [1, longest = {longest}]"), shortest);
    }
    Ok(())
}

macro_rules! index {
    ($class:ident, $name:literal, $index:ident, $doc:literal) => {
        #[doc = $doc]
        #[pyclass(module = "tilewise._core", name = $name)]
        pub struct $class($index);

        #[pymethods]
        impl $class {
            #[new]
            fn new(py: Python<'_>, longest: usize, shortest: usize) -> PyResult<Self> {
                checked(py, longest, shortest, $index::LONGEST)?;
                Ok(Self($index::new(longest, shortest)))
            }

            fn extend(&mut self, tokens: Vec<u32>) {
                self.0.extend(&tokens);
            }

            fn truncate(&mut self, length: usize) {
                self.0.truncate(length);
            }

            /// Tokens that may follow the text and `after`, and how many of the last ones were matched.
            fn propose(&mut self, count: usize, after: Vec<u32>) -> (Vec<u32>, usize) {
                let proposal = self.0.propose_after(&after, count);
                (proposal.tokens, proposal.matched)
            }

            fn __len__(&self) -> usize {
                self.0.len()
            }
        }
    };
}
index!(PyNGramIndex, "NGramIndex", NGramIndex, "What followed the last occurrence of the last n tokens.");
index!(PySuffixIndex, "SuffixIndex", SuffixIndex, "What most often followed the longest context seen before.");

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyNGramIndex>()?;
    module.add_class::<PySuffixIndex>()
}
