"""Numbers of an optimizer that can be a schedule, and set during training as a float."""

from typing import Any

import keras

from keras_kfc.utils.arguments import check_number

_Schedule = keras.optimizers.schedules.LearningRateSchedule


class Hyperparameter:
    """An attribute of an optimizer: its value now, from a variable or a schedule.

    Args:
        optional: Whether None is a value, which holds for good.
    """

    def __init__(self, optional: bool = False):
        self._optional = optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self._slot = name, f"_{name}"

    def held_by(self, optimizer: Any) -> Any:
        """The variable of an optimizer that holds the value, or its schedule, or None."""
        return getattr(optimizer, self._slot)

    def check(self, value: Any) -> None:
        """Raises an error in Keras's style if a value cannot be set.

        Raises:
            TypeError: If it is neither a number nor a schedule.
            ValueError: If it is out of range.
        """
        if not (isinstance(value, _Schedule) or (value is None and self._optional)):
            check_number(self.name, value, 0)

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        held = getattr(optimizer, self._slot)
        return held(optimizer.iterations) if isinstance(held, _Schedule) else held

    def __set__(self, optimizer: Any, value: Any) -> None:
        name, held = self.name, getattr(optimizer, self._slot, None)
        created_with_none = held is None and hasattr(optimizer, self._slot)
        self.check(value)
        if isinstance(held, keras.Variable) and not isinstance(value, _Schedule | None):
            held.assign(float(value))
            return
        if isinstance(held, _Schedule) and not isinstance(value, _Schedule):
            raise TypeError(
                "This optimizer was created with a `LearningRateSchedule` object as its "
                f"`{name}`, hence its {name} is not settable. Create the optimizer with a "
                f"float `{name}` instead."
            )
        if optimizer.built or (created_with_none and value is not None):
            or_none = " or None" if self._optional else ""
            raise TypeError(
                f"A train step that was traced reads the `{name}` that the optimizer had then: "
                f"set a `LearningRateSchedule`{or_none} when the optimizer is created, and a float "
                f"at any time if it was created with one. Received: {name}={value!r}"
            )
        if isinstance(held, keras.Variable):
            optimizer.forget_variable(held)
        if value is not None and not isinstance(value, _Schedule):
            value = optimizer.add_variable(
                (),
                initializer=keras.initializers.Constant(float(value)),
                name=name,
                aggregation="only_first_replica",
            )
        setattr(optimizer, self._slot, value)

    def serialized(self, optimizer: Any) -> Any:
        """What goes into the configuration: a number, a serialised schedule, or None."""
        held = getattr(optimizer, self._slot)
        if isinstance(held, keras.Variable):
            return float(held.numpy())
        return None if held is None else keras.optimizers.schedules.serialize(held)

    def deserialized(self, config: dict[str, Any], custom_objects: Any = None) -> dict[str, Any]:
        """A configuration with the schedule in place of its serialised form."""
        value = config.get(self.name)
        if not isinstance(value, dict):
            return config
        schedule = keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
        return {**config, self.name: schedule}
