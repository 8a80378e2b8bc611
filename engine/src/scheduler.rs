//! Which sequences a step holds. Pure.
