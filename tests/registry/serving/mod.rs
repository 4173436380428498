//! The daemon with layers in registries: guest bytes, requests, refusals, outages, kills.

mod opening;
mod outages;
mod prefetch;
mod refusals;
