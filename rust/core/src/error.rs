//! The one error type. A variant says *what kind* of mistake it is; its fields say which argument,
//! what was passed, what is allowed, and the nearest fix. The binding maps variants to exceptions.

use std::fmt;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// An array has the wrong rank or extents.
    Shape {
        /// Argument at fault.
        name: String,
        /// What would have been accepted, with named axes.
        allowed: String,
        /// The shape that was passed.
        got: Vec<usize>,
        /// The nearest fix; may be empty.
        hint: String,
    },
    /// An array has an element type that the operation does not take.
    Dtype {
        /// Argument at fault.
        name: String,
        /// Accepted types.
        allowed: String,
        /// The type that was passed.
        got: String,
        /// The nearest fix; may be empty.
        hint: String,
    },
    /// A value lies outside what is meaningful.
    Value {
        /// Argument at fault.
        name: String,
        /// Accepted values.
        allowed: String,
        /// The value that was passed.
        got: String,
        /// The nearest fix; may be empty.
        hint: String,
    },
    /// An array lives on a device this build cannot reach from here.
    Device {
        /// Argument at fault.
        name: String,
        /// Accepted devices.
        allowed: String,
        /// Where the array is.
        got: String,
    },
    /// The user asked to stop (Ctrl-C) and the work was abandoned between two tiles.
    Interrupted,
    /// A bug of tilewise: a panic that was caught at the door.
    Internal(String),
}

impl Error {
    /// A shape error without a hint.
    pub fn shape(name: &str, allowed: impl Into<String>, got: &[usize]) -> Self {
        Error::Shape { name: name.into(), allowed: allowed.into(), got: got.to_vec(), hint: String::new() }
    }

    /// A dtype error without a hint.
    pub fn dtype(name: &str, allowed: impl Into<String>, got: impl fmt::Display) -> Self {
        Error::Dtype { name: name.into(), allowed: allowed.into(), got: got.to_string(), hint: String::new() }
    }

    /// A value error without a hint.
    pub fn value(name: &str, allowed: impl Into<String>, got: impl fmt::Display) -> Self {
        Error::Value { name: name.into(), allowed: allowed.into(), got: got.to_string(), hint: String::new() }
    }

    /// The same error with the nearest fix attached.
    pub fn hint(mut self, text: impl Into<String>) -> Self {
        match &mut self {
            Error::Shape { hint, .. } | Error::Dtype { hint, .. } | Error::Value { hint, .. } => *hint = text.into(),
            Error::Device { .. } | Error::Interrupted | Error::Internal(_) => {}
        }
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, hint) = match self {
            Error::Shape { name, allowed, got, hint } => {
                let got = got.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
                (format!("{name}: expected {allowed}, got shape ({got})"), hint.as_str())
            }
            Error::Dtype { name, allowed, got, hint } => {
                (format!("{name}: expected dtype {allowed}, got {got}"), hint.as_str())
            }
            Error::Value { name, allowed, got, hint } => {
                (format!("{name}: expected {allowed}, got {got}"), hint.as_str())
            }
            Error::Device { name, allowed, got } => (format!("{name}: expected an array on {allowed}, got {got}"), ""),
            Error::Interrupted => ("interrupted".to_string(), ""),
            Error::Internal(what) => (format!("internal error in tilewise (please report it): {what}"), ""),
        };
        if hint.is_empty() { f.write_str(&text) } else { write!(f, "{text}; {hint}") }
    }
}

impl std::error::Error for Error {}
