// A forward that is run again and again on the same memory: everything but the weights is known beforehand.

#pragma once

#include <cstdint>
#include <vector>

#include "model.h"

namespace sequoia::forward {

// What runs calls: a model's forward.
class Runner {
  public:
    virtual ~Runner() = default;
    virtual bool accepts(const Call& call) const = 0;  // whether the call's numbers are in range
    virtual void run(const Call& call, int num_threads) = 0;
    virtual std::int64_t num_embeddings() const = 0;
    virtual std::int64_t vocab() const = 0;  // width of the logits
};

class BoundForward {
  public:
    // The call's tensors and logits are given to each run.
    BoundForward(Runner& runner, const Call& call)
        : runner_(runner), call_(call), fed_(static_cast<std::size_t>(call.num_rows())) {}

    // Scores the tokens that lie where the call says. One that could not be drawn is -1: it is fed as token 0; one that
    // the model has no embedding of as the last that it has. Hidden states are left as a call's, if asked for. Returns
    // false, and has written nothing, where a length leaves no room in the cache.
    bool run(const std::uintptr_t* tensors, void* logits, int num_threads, float* const* hidden = nullptr) {
        Call call = call_;
        const std::int64_t last = runner_.num_embeddings() - 1;
        for (std::size_t i = 0; i < fed_.size(); ++i) {
            const std::int64_t token = call_.tokens[i];
            fed_[i] = token < 0 ? 0 : token > last ? last : token;
        }
        call.tokens = fed_.data();
        call.tensors = tensors;
        call.logits = logits;
        call.hidden = hidden;
        if (!runner_.accepts(call)) return false;
        runner_.run(call, num_threads);
        return true;
    }

    std::int64_t num_requests() const { return call_.num_requests; }
    std::int64_t num_nodes() const { return call_.num_nodes; }
    std::int64_t vocab() const { return runner_.vocab(); }
    ElementType logits_type() const { return call_.logits_type; }

  private:
    Runner& runner_;
    Call call_;
    std::vector<std::int64_t> fed_;  // [B, N]
};

}  // namespace sequoia::forward
